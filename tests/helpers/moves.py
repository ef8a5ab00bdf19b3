"""Which parameters moved at which optimizer step, by name: the evidence of the tests about frozen layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ist import IST, SparseTuner
from tests.helpers.tiny import cycle, layer_of, snapshot

EARLY = 7
"""A seed whose first four choices of one or two layers among up to four take every layer."""


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    blocks: set[int]
    """Numbers of the active layers' blocks, as in the parameters' names."""
    moved: set[str]
    """Names of the parameters that the step moved."""


def moved_names(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """The parameters with other bits than `before`; those that came or went since are passed over."""
    after = dict(model.named_parameters())
    return {name for name in before if name in after and not torch.equal(before[name], after[name])}


def active_blocks(tuner: SparseTuner) -> set[int]:
    assert tuner.active_layers is not None
    return {int(tuner.layers[index].name.rsplit(".", 1)[1]) for index in tuner.active_layers}


def in_blocks(names: Iterable[str], blocks: set[int]) -> set[str]:
    return {name for name in names if layer_of(name) in blocks}


class Moves(TrainerCallback):
    """Writes down the steps of a Trainer with IST."""

    def __init__(self, ist: IST) -> None:
        self._ist = ist
        self.steps: list[Step] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert self._ist.tuner is not None
        self._blocks = active_blocks(self._ist.tuner)
        self._before = snapshot(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(Step(self._blocks, moved_names(self._before, model)))


def train_sparsely(
    model: nn.Module,
    batches: list[Any],
    num_steps: int = 5,
    interventions: dict[str, Callable[[nn.Module], object]] | None = None,
    **options: Any,
) -> list[Step]:
    """A loop by hand with two micro-batches a step, under AdamW with weight decay on *every* parameter of the model.

    Interventions happen at a moment: "before the forward", "before the backward", "between micro-batches" or
    "before the optimizer".
    """
    act = interventions or {}
    do_nothing: Callable[[nn.Module], object] = lambda model: None  # noqa: E731
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    stream: Iterator[Any] = cycle(batches)
    steps: list[Step] = []
    config = {"num_active_layers": 1, "update_interval": 2, "seed": EARLY, "probe_batches": batches, **options}
    with SparseTuner(model, **config) as tuner:
        for _ in range(num_steps):
            tuner.begin_step()
            blocks, before = active_blocks(tuner), snapshot(model)
            for micro in range(2):
                if micro == 1:
                    act.get("between micro-batches", do_nothing)(model)
                act.get("before the forward", do_nothing)(model)
                outputs = model(**next(stream))
                loss = outputs["loss"]
                act.get("before the backward", do_nothing)(model)
                loss.backward()
            act.get("before the optimizer", do_nothing)(model)
            optimizer.step()
            optimizer.zero_grad()
            steps.append(Step(blocks, moved_names(before, model)))
            tuner.end_step(optimizer)
    return steps
