"""The flags of `ist train` for focused training."""

from __future__ import annotations

from dataclasses import dataclass

from ...config import check_choice
from ...method.spreading import SPREADS
from ...probing.criteria import CRITERIA, TRAINED
from .numbers import parse_focus

__all__ = ["FocusArguments"]


@dataclass
class FocusArguments:
    """Which layers `--method focused` gives adapters, and how they start; these docstrings are the flags' help."""

    num_focused_layers: str | None = None
    """Layers that get adapters with `--method focused`, as a count (12) or as a fraction (0.5); half by default."""

    focused_rank: str = "moved"
    """Rank with `--method focused`: `moved` raises it so that as many parameters train as in all layers, `uneven` the
    same and more where layers matter more, `kept` leaves it, and a number sets it."""

    focus_criterion: str = "gradient"
    """What makes a layer important before training: `gradient` (the size of an adapter's first gradient),
    `relative_gradient` (the same, relative to the size of the layer's output), `first_step` (what Adam's first step
    would gain) or `activation` (the size of the layer's output)."""

    focus_spread: str = "parts"
    """How `--method focused` spreads its layers: `parts` (the best of each equal part of the depth), `distance` (the
    best sum with bounded gaps), `even` or `anywhere`."""

    focus_min_depth: float = 0.0
    """Lowest part of the depth, as a fraction, that gets no adapters with `--method focused`."""

    focus_init: str = "random"
    """LoRA's `A` at the start with `--method focused`: `random` (as PEFT draws it) or `gradient` (the right singular
    vectors of the first gradient)."""

    def check_focus(self) -> None:
        """Raise ValueError where a flag is not allowed."""
        check_choice("focus_criterion", self.focus_criterion, [name for name in CRITERIA if name not in TRAINED])
        check_choice("focus_spread", self.focus_spread, SPREADS)
        check_choice("focus_init", self.focus_init, ("random", "gradient"))
        parse_focus(self.num_focused_layers, self.focused_rank)
