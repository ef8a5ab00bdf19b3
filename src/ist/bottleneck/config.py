"""The settings of a bottleneck adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType
from torch import Tensor
from torch.nn import functional

from ..config import check_choice, is_number
from ..runs.files import write_whole
from .places import PLACEMENT_MODES, Mode, Placement
from .sparse import PRUNINGS, check_sparsity

__all__ = ["BottleneckConfig"]

PEFT_TYPE = "BOTTLENECK"

LOADING = """## Loading this adapter

PEFT learns of bottleneck adapters from the package `ist-peft`:

```python
import ist.bottleneck  # before PEFT loads the adapter
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/adapter")
```
"""

NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": functional.tanh,
    "leaky_relu": functional.leaky_relu,
}

IDENTITY = "identity"
"""`f` of LoRA, which has none."""


@dataclass
class BottleneckConfig(PeftConfig):
    """Series or parallel bottleneck adapters `f(x W_down) W_up` on linear modules.

    Series (eq. 13 of Yao et al., 2024): `H_o <- H_o + f(H_o W_down) W_up`, on the output of an output projection; an
    input projection has the adapter on its input instead, `Linear(x + f(x W_down) W_up)`.
    Parallel (eq. 11): `H_o <- H_o + f(H_i W_down) W_up`, from the input of a module to its output.
    `W_up` starts at zero, so an untrained adapter changes nothing.

    Raises:
        ValueError: a value is outside what is allowed; the message says what is and how to fix it.
    """

    mode: Mode = "series"
    """`series` or `parallel`."""

    bottleneck_size: int = 256
    """`r`, the width between the two projections, at least 1; the paper uses 256."""

    non_linearity: str = "relu"
    """`f`: `relu`, `gelu`, `silu`, `tanh` or `leaky_relu`."""

    dropout: float = 0.0
    """Probability in [0, 1) with which training zeroes elements of the adapter's input."""

    scaling: float = 1.0
    """Finite factor on what the adapter adds."""

    sparsity: float = 0.0
    """Fraction in [0, 1) of the adapter's weights that are pruned before training (SparseAdapter, He et al., 2022):
    they are zero and stay so. Counts such as `print_trainable_parameters` name all weights, pruned ones among them."""

    pruning: str = "random"
    """Which weights to prune where `sparsity` is not 0: `random`; `magnitude`, the smallest of `W_down` as drawn
    (`W_up` starts at zero, so its mask is drawn at random); or `snip`, none until `ist.bottleneck.prune_adapter` has
    seen data."""

    target_modules: list[str] | str | None = None
    """Ends of the names of the modules to adapt, or a regular expression for whole names. `None` finds them by
    `placement`, and the ends that were found replace it when the model is made."""

    output_modules: list[str] | None = None
    """Series only: ends of names of those modules whose adapter acts on their output; on the other targets it acts on
    the input. `None` stands for the usual names of output projections (`down_proj`, `fc2`, `o_proj`, …)."""

    placement: Placement | None = None
    """Where the adapters go when `target_modules` is `None`: `paper` (also meant by `None`) on the input of Up and the
    output of Down (series), or around Up and Gate (parallel); `houlsby`, series after the output projections of the
    attention and of the MLP; `pfeiffer`, series after that of the MLP; `he`, parallel around the MLP as a whole."""

    exclude_modules: list[str] | str | None = None
    """Names to leave out, written as in `target_modules`."""

    lora_modules: list[str] | None = None
    """Ends of the names of linear modules that get LoRA beside the bottlenecks on the others, `W x + s B A x` with
    `s = lora_alpha / lora_r`: such as `q_proj` and `v_proj`, with a series adapter after the MLP."""

    lora_r: int = 8
    """Rank of that LoRA, at least 1."""

    lora_alpha: float = 16.0
    """Its scale is `lora_alpha / lora_r`."""

    layers_to_transform: list[int] | int | None = None
    """Numbers of the layers to adapt; `None` adapts all."""

    modules_to_save: list[str] | None = None
    """Modules to train in full and to save beside the adapter, such as a new classification head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        check_choice("mode", self.mode, PLACEMENT_MODES["paper"])
        check_choice("non_linearity", self.non_linearity, NON_LINEARITIES)
        check_choice("pruning", self.pruning, PRUNINGS)
        check_numbers(self)
        check_lora(self)
        check_sparsity(self.sparsity)
        check_places(self)

    def lora_settings(self) -> BottleneckConfig:
        """The settings of a module with LoRA: a bottleneck without a non-linearity, from the module's input."""
        settings = copy.copy(self)
        settings.bottleneck_size, settings.non_linearity = self.lora_r, IDENTITY
        settings.scaling = self.lora_alpha / self.lora_r
        return settings

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the settings as PEFT does, and say in the model card beside them, if there is one, how to load."""
        super().save_pretrained(save_directory, **kwargs)
        explain_loading(Path(save_directory) / "README.md")


def explain_loading(card: Path) -> None:
    """Add to a model card, once, that PEFT must be told of bottleneck adapters before it can load one."""
    text = card.read_text(encoding="utf-8").rstrip() if card.is_file() else ""
    if text and LOADING.rstrip() not in text:
        write_whole(card, f"{text}\n\n{LOADING}")


def check_numbers(config: BottleneckConfig) -> None:
    """Raise ValueError unless size, dropout and scaling are numbers in their ranges."""
    size, dropout, scaling = config.bottleneck_size, config.dropout, config.scaling
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"bottleneck_size={size!r} is not a whole number of at least 1: the paper uses 256.")
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} is not a probability in [0, 1): use 0 for none.")
    if not is_number(scaling) or not math.isfinite(scaling):
        raise ValueError(f"scaling={scaling!r} is not a finite number: use 1 to add the adapter's output as it is.")


def check_lora(config: BottleneckConfig) -> None:
    """Raise ValueError unless the options of LoRA beside bottlenecks are in their ranges and go with the others."""
    r, alpha = config.lora_r, config.lora_alpha
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"lora_r={r!r} is not a whole number of at least 1: LoRA's usual one is 8.")
    if not is_number(alpha) or not math.isfinite(alpha):
        raise ValueError(f"lora_alpha={alpha!r} is not a finite number: twice lora_r is usual.")
    if isinstance(config.lora_modules, str):
        raise ValueError(f"lora_modules={config.lora_modules!r} is not a list of names: write it as a list.")
    if config.lora_modules and isinstance(config.target_modules, str):
        raise ValueError("lora_modules does not go with a regular expression: pass target_modules as a list.")


def check_places(config: BottleneckConfig) -> None:
    """Raise ValueError where the options that say which modules to adapt contradict each other."""
    if config.placement is not None:
        check_choice("placement", config.placement, PLACEMENT_MODES)
        modes = PLACEMENT_MODES[config.placement]
        if config.mode not in modes:
            raise ValueError(
                f"placement={config.placement!r} does not go with mode={config.mode!r}: use mode={modes[0]!r}."
            )
        if config.target_modules is not None:
            raise ValueError(f"placement={config.placement!r} and target_modules both say where: pass one of them.")
    if config.output_modules is not None:
        check_output_modules(config)
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        raise ValueError("layers_to_transform has no effect on a regular expression: pass target_modules as a list.")


def check_output_modules(config: BottleneckConfig) -> None:
    """Raise ValueError where `output_modules` is not a list or could have no effect."""
    if isinstance(config.output_modules, str):
        raise ValueError(f"output_modules={config.output_modules!r} is not a list of names: write it as a list.")
    if config.mode == "parallel":
        raise ValueError(f"output_modules={config.output_modules!r} has no effect in mode='parallel': leave it out.")
    if config.target_modules is None:
        raise ValueError(f"output_modules={config.output_modules!r} needs target_modules: pass both, or neither.")
