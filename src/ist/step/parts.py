"""All that a step does to the model, in its order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ..adapters.adalora import RankAllocation
from ..adapters.lora_fa import FrozenPairs, is_lora_fa
from ..adapters.view import ModelView
from ..config import StepOptions
from ..runtime.ddp import TiedOutputs
from ..runtime.part import Part
from .activation import LayerActivation
from .boundary import Boundary
from .compiled import make_room_for_graphs
from .depth import BackwardDepth
from .frozen_check import FrozenCheck
from .gradient_check import GradientCheck
from .interrupted import Interruption
from .optimizer_state import OptimizerState, weak
from .prefetch import BackwardPrefetch
from .recompute import Recompute
from .same_adapters import SameAdapters
from .skipped import SkippedSteps

__all__ = ["StepParts"]


@dataclass
class Attached:
    """An optimizer and the parts that it needs."""

    optimizer: Callable[[], Any]
    """Gives it, while it lives."""
    parts: tuple[Part, ...]
    given: bool = False
    """Whether it was given to the tuner, and not only seen to step."""


class StepParts:
    """The parts of a step, each begun, ended and closed in turn.

    Args:
        view: the model in training.
        config: how a step is executed.

    Raises:
        ValueError: an option does not fit the model; nothing is hooked before `open`.
    """

    def __init__(self, view: ModelView, config: StepOptions) -> None:
        self._view, self._config = view, config
        self._recompute = Recompute(view, config.recompute)
        self._parts: tuple[Part, ...] = ()
        self._of_optimizers: list[Attached] = []
        self._begun: tuple[Collection[int], int] | None = None
        """The layers and the number of the last step, which may have just ended."""

    def open(self, on_update: Callable[[], None], on_interruption: Callable[[], None]) -> None:
        """Put the parts on the model.

        Args:
            on_update: a method that is called after each update of the layers by an optimizer.
            on_interruption: a method that is called where the training which began a step is found to be over.
        """
        view, config = self._view, self._config
        self.activation = LayerActivation(
            view, config.fused, config.frozen_dropout, config.recompute in ("norms", "frozen")
        )
        """Which layers train."""
        self.interruption = Interruption(view.model, on_interruption)
        """Whether the training that began the step is over."""
        frozen_check = FrozenCheck(view)  # Its hooks come before the boundary's, which end the step.
        own = (parameter for layer in view.layers for parameter in layer.parameters)
        self.boundary = Boundary(own, on_update, self.interruption.updated, self._before_step)
        """Whether the optimizer has stepped."""
        self.skipped = SkippedSteps(view, self.boundary)
        """How many steps in a row a GradScaler has skipped."""
        self.tied_outputs = TiedOutputs(view.model, self.activation.frozen_parameters)
        """What DDP reduces."""
        self._same_adapters = SameAdapters(view)
        make_room_for_graphs(view)
        self._parts = (
            self._same_adapters,
            self.activation,
            self._recompute,
            BackwardDepth(view, self.activation),
            BackwardPrefetch(view),
            self.tied_outputs,
            frozen_check,
            self.boundary,
            self.interruption,
            self.skipped,
            GradientCheck(view),
            *(() if view.adalora is None else (RankAllocation(view.adalora),)),
        )

    def attach(self, optimizer: Any) -> bool:
        """Take the parts that the optimizer needs, beside those of earlier ones, with which it may take turns.

        Args:
            optimizer: unwrapped; it is not kept alive, and its parts go with it.

        Returns:
            Whether it was not given before.

        Raises:
            ValueError: its state cannot be offloaded, or the adapters are not those that the tuner was made for.
        """
        self._same_adapters.check()
        known = self._find(optimizer)
        if known is not None and known.given:
            return False
        self._same_adapters.check_parameters()
        known = known or self._add(optimizer)
        self.boundary.hear(optimizer)
        known.given = True
        return True

    def _find(self, optimizer: Any) -> Attached | None:
        """What an optimizer has, where it is known; those that are gone are forgotten."""
        self._of_optimizers = [attached for attached in self._of_optimizers if attached.optimizer() is not None]
        return next((attached for attached in self._of_optimizers if attached.optimizer() is optimizer), None)

    def _add(self, optimizer: Any) -> Attached:
        """Make the parts that an optimizer needs."""
        state = OptimizerState(optimizer, self._view, self._config.optimizer_state)
        pairs = (FrozenPairs(optimizer, self.activation.frozen_ids),) if is_lora_fa(optimizer) else ()
        attached = Attached(weak(optimizer), (state, *pairs))
        self._of_optimizers.append(attached)
        return attached

    def _before_step(self, optimizer: Any) -> None:
        """An optimizer of the layers is about to step, perhaps one that was never given: of two in a step one is."""
        if self._find(optimizer) is not None:
            return
        parts = self._add(optimizer).parts
        if self._begun is not None:  # Also where the step has just ended, with the update by the other one.
            for part in parts:
                part.begin(*self._begun)

    def check_length(self, num_steps: int) -> None:
        """Warn where a training of so many steps does not fit."""
        for part in self._all():
            part.check_length(num_steps)

    def begin(self, active: Collection[int], step: int) -> None:
        """A step begins: from now on the layers `active` train alone. Where a part raises, none has begun."""
        try:
            for part in self._all():
                part.begin(active, step)
        except BaseException:
            self.give_up()
            raise
        self._begun = active, step

    def continues(self) -> None:
        """A block begins: of a new step, or of one that an earlier block began; not of one whose training is over.

        Raises:
            ValueError: the step continues with other adapters; it is given up.
        """
        if self.interruption.was_shown():
            self.give_up()
        elif self.activation.active is not None:
            self.check_adapters()
            self.skipped.continues()

    def check_adapters(self) -> None:
        """A micro-batch ends, after which the step continues or its optimizer steps.

        Raises:
            ValueError: other adapters are active; the step is given up.
        """
        try:
            self._same_adapters.check()
        except ValueError:
            self.give_up()
            raise

    def before_update(self) -> None:
        """The optimizer is about to step."""
        for part in self._all():
            part.before_update()

    def after_update(self, step: int) -> None:
        """The optimizer has stepped."""
        for part in self._all():
            part.after_update(step)

    def end(self) -> None:
        """The step is over."""
        for part in self._all():
            part.end()

    def give_up(self) -> None:
        """The step is over without an update."""
        for part in self._all():
            part.give_up()

    def close(self) -> None:
        """Leave the model as it was: the last part first, and every one of them, also where one fails."""
        parts, self._parts, self._of_optimizers = self._all(), (), []
        close_all(parts)

    def _all(self) -> tuple[Part, ...]:
        return (*self._parts, *(part for attached in self._of_optimizers for part in attached.parts))


def close_all(parts: Iterable[Part]) -> None:
    """Close parts, the last one first, and every one of them also where one fails."""
    with ExitStack() as closing:
        for part in parts:
            closing.callback(part.close)
