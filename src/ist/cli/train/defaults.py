"""What `ist train` sets where nobody says otherwise: TRL's defaults suit full fine-tuning, these suit adapters."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from typing import Any

from ...runtime.packages import distribution_of, how_to_install
from ..parsing import check_commas

__all__ = [
    "DEFAULTS",
    "check_mappings",
    "check_reporters",
    "settle_learning_rate",
]

ADAPTER_RATE = 2e-4
"""The paper's learning rate of adapters, ten times TRL's, which suits a model's own weights."""

DEFAULTS: dict[str, Any] = {"gradient_checkpointing": False}
"""Defaults of TRL's flags that are others here. Gradient checkpointing costs a quarter of the time or more, and
adapters keep no optimizer state that would make memory short: who needs it asks for it."""

REPORTERS = {
    "azure_ml": "azureml",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet_ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "kubeflow": "kubeflow",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""Names for `--report_to`, and the module that each one needs."""


OBJECT_FILES = ("accelerator_config", "deepspeed", "fsdp_config")
"""Flags that take a JSON object or the file of one."""


def settle_learning_rate(adapter: str, training: Any, named: Collection[str]) -> None:
    """Give adapters their own learning rate, unless the command line or the recipe names one."""
    if adapter != "none" and "learning_rate" not in named:
        training.learning_rate = ADAPTER_RATE


def check_reporters(names: Any) -> None:
    """Raise ValueError where a program that the log goes to is unknown or not installed.

    Args:
        names: the value of `--report_to`, as transformers has settled it.
    """
    check_commas("--report_to", [*(names or ())])
    for name in names or ():
        if name not in REPORTERS:
            raise ValueError(f"report_to={name!r} is unknown: choose some of {', '.join(REPORTERS)}, or none.")
        if find_spec(REPORTERS[name]) is None:
            raise ValueError(
                f"--report_to {name} needs the package {distribution_of(REPORTERS[name])}, which is not installed: run "
                f"`{how_to_install(REPORTERS[name])}`, or leave --report_to out."
            )


def check_mappings(flags: Mapping[str, Any], names: Collection[str]) -> None:
    """Raise ValueError where a flag that takes a JSON object has none; some take the file of one instead.

    Args:
        flags: parsed ones, by name.
        names: of the flags that take an object.
    """
    for name in names:
        text = flags.get(name)
        if not isinstance(text, str) or (name in OBJECT_FILES and not text.startswith("{")):
            continue
        try:
            fits = isinstance(json.loads(text), dict)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"{name}={text} is no JSON object: write it as --{name} '{{\"key\": 1}}'.")
