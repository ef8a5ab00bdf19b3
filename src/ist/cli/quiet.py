"""Other libraries' warnings, logs and progress bars, which would stand between the lines of a command."""

from __future__ import annotations

import logging
import os
import warnings

import datasets
import transformers

__all__ = ["quiet_libraries"]


def quiet_libraries() -> None:
    """Leave the console to the run: libraries speak up at warnings only, and progress bars of loading are off."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    main = os.environ.get("RANK", "0") == "0"
    logging.getLogger("ist").setLevel(logging.WARNING if main else logging.ERROR)
    logging.getLogger("ist.step.announce").setLevel(logging.ERROR)  # The display says the same.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")
