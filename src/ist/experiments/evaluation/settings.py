"""What an evaluation depends on beside its model and its data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ...config import check_choice, check_whole
from .extraction import EXTRACTIONS, Extraction
from .generation import GREEDY, Generation
from .likelihood import OPTION_FORMS, OptionForm
from .metrics import METRICS, Metric

__all__ = ["PROTOCOLS", "EvaluationSettings", "Protocol"]

Protocol = Literal["generate", "likelihood", "loss", "lm-eval"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
_DEPENDS_ON: dict[str, tuple[str, ...]] = {
    "generate": ("generation", "max_new_tokens", "extraction", "max_length", "seed"),
    "likelihood": ("options", "max_length"),
    "loss": ("max_length", "window", "stride"),
    "lm-eval": ("num_fewshot", "limit", "max_length", "seed"),
}


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How to evaluate; each protocol reads those that concern it."""

    batch_size: int = 32
    """Sequences computed at once."""
    max_length: int | None = None
    """Most tokens of a sequence; a longer prompt loses its beginning. None: no limit."""
    options: OptionForm = "label"
    """What the likelihood is taken of, see `option_texts`."""
    generation: Generation = GREEDY
    max_new_tokens: int | None = None
    """Tokens of an answer; None: the task's own number, 32 or 256 as in LLM-Adapters."""
    extraction: Extraction = "careful"
    """How an answer is found in what was generated."""
    metric: Metric = "exact_match"
    """How answers to rows of the user's own are marked."""
    labels: tuple[str, ...] = ()
    """For `label_accuracy`; empty: the different answers of the rows."""
    window: int = 1024
    """Tokens of a window of plain text."""
    stride: int | None = None
    """Tokens from one window to the next; None: windows do not overlap."""
    num_fewshot: int | None = None
    """Examples in the prompt, for lm-evaluation-harness."""
    task_folder: str | None = None
    """A folder with tasks for lm-evaluation-harness, beside its own."""
    limit: int | None = None
    """Rows of each task; None: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size, at_least=1, why="something must be computed")
        check_choice("options", self.options, OPTION_FORMS)
        check_choice("extraction", self.extraction, EXTRACTIONS)
        check_choice("metric", self.metric, METRICS)
        for name, least in {"max_length": 2, "max_new_tokens": 1, "limit": 1, "stride": 1, "num_fewshot": 0}.items():
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), at_least=least, why="leave it out for the default")

    def of(self, protocol: str) -> dict[str, Any]:
        """The settings that a protocol's answers depend on, as plain values."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in _DEPENDS_ON[protocol]}
