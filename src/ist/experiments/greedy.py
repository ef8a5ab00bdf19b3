"""Greedy search for a fixed set of layers: add the layer whose training helps most, again and again.

It is the search of Kaplun et al., "Less is More: Selective Layer Finetuning with SubTuning" (2023), on the layers of
this library. Each candidate is trained for a few steps from the same start on the same batches, and judged by the loss
on held-out ones. That is dear: `k` layers out of `N` take `k·N − k·(k − 1)/2` short trainings before the real one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters.adalora import find_adalora
from ..config import ISTConfig, check_whole, resolve_config
from ..method.registry import FixedSelector
from ..probing.suppression import LossFunction, model_loss
from ..runtime.distributed import current_ranks
from ..runtime.modes import evaluation_mode, same_modes_after, to_device
from ..runtime.randomness import keyed_seed, private_randomness
from ..tuner import SparseTuner

__all__ = ["GreedySearch", "count_trainings", "greedy_layers", "search_greedily"]


@dataclass(frozen=True)
class GreedySearch:
    """What a greedy search found, and what it took."""

    layers: tuple[int, ...]
    """The layers, in the order in which they were added."""
    losses: tuple[float, ...]
    """The held-out loss with the set after each addition."""
    trials: tuple[tuple[tuple[int, ...], float], ...]
    """Every set that was tried, and its loss."""
    seconds: float = 0.0
    """Time spent."""
    num_steps: int = 0
    """Optimizer steps in all trials together."""


def count_trainings(num_layers: int, num_chosen: int) -> int:
    """How many short trainings a search takes at most."""
    return num_chosen * num_layers - num_chosen * (num_chosen - 1) // 2


def search_greedily(
    num_layers: int,
    num_chosen: int,
    evaluate: Callable[[tuple[int, ...]], float],
    min_gain: float | None = None,
) -> GreedySearch:
    """Add the layer that lowers the loss most, until there are enough.

    Args:
        num_layers: `N`, layers to choose from.
        num_chosen: `k`, layers to choose.
        evaluate: the loss of a set, its layers in ascending order; lower is better.
        min_gain: stop early where an addition lowers the loss by less than this (SubTuning's ε); None never stops. The
            first layer is always added.

    Returns:
        The layers in the order of their addition. Of equally good ones the one nearer the input is added.
    """
    chosen: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    trials: list[tuple[tuple[int, ...], float]] = []
    for _ in range(num_chosen):
        tried = {layer: evaluate(tuple(sorted((*chosen, layer)))) for layer in range(num_layers) if layer not in chosen}
        trials += [(tuple(sorted((*chosen, layer))), loss) for layer, loss in tried.items()]
        best = min(tried, key=lambda layer: (tried[layer] != tried[layer], tried[layer]))  # a loss of NaN is the worst
        if losses and min_gain is not None and not losses[-1] - tried[best] >= min_gain:
            break
        chosen, losses = (*chosen, best), (*losses, tried[best])
    return GreedySearch(chosen, losses, tuple(trials))


def greedy_layers(
    model: nn.Module,
    config: ISTConfig | None = None,
    *,
    train_batches: Sequence[Mapping[str, Any]],
    validation_batches: Sequence[Mapping[str, Any]],
    num_steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    min_gain: float | None = None,
    layers: str | Sequence[str] | None = None,
    loss_function: LossFunction = model_loss,
    autocast: torch.dtype | None = None,
    on_trial: Callable[[tuple[int, ...], float], object] | None = None,
    **options: Any,
) -> GreedySearch:
    """Search greedily for the `N_u` layers to train, by short trainings with AdamW.

    The model is the same to the bit afterwards, and so are the global random generators. What lies outside of the
    layers trains in each trial too.

    Args:
        model: with adapters, or without them for whole layers.
        config: gives `N_u` (`num_active_layers`) and the seed; or give options as keywords.
        train_batches: each trial goes through them from the first on, again and again.
        validation_batches: each trial is judged by the mean of its losses on them; none should be trained on.
        num_steps: optimizer steps of a trial.
        learning_rate: of all steps of a trial.
        weight_decay: of AdamW.
        min_gain: see `search_greedily`.
        layers: the stack of blocks to choose from, see `discover_layers`.
        loss_function: `(model, batch) -> loss`, a scalar in nats.
        autocast: the type to compute in; None is that of the weights.
        on_trial: is told each trial's layers and loss.
        options: fields of `ISTConfig`.

    Raises:
        ValueError: several processes train together, there are no batches, or the model or an option does not fit.
    """
    config = resolve_config(config, options, greedy_layers)
    check_search(model, train_batches, validation_batches, num_steps)
    start = time.perf_counter()
    with SparseTuner(model, config, probe_batches=[], selector="all", layers=layers) as tuner, same_modes_after(model):
        trials = Trials(
            tuner, train_batches, validation_batches, num_steps, learning_rate, weight_decay, loss_function, autocast
        )

        def evaluate(candidate: tuple[int, ...]) -> float:
            loss = trials.loss_of(candidate)
            if on_trial:
                on_trial(candidate, loss)
            return loss

        num_chosen = config.layer_counts(len(tuner.layers)).active
        try:
            found = search_greedily(len(tuner.layers), num_chosen, evaluate, min_gain)
        finally:
            trials.put_back()
    steps = num_steps * len(found.trials)
    return GreedySearch(found.layers, found.losses, found.trials, time.perf_counter() - start, steps)


def check_search(
    model: nn.Module,
    train_batches: Sequence[Mapping[str, Any]],
    validation_batches: Sequence[Mapping[str, Any]],
    num_steps: int,
) -> None:
    """Raise ValueError where a search cannot be made."""
    check_whole("num_steps", num_steps, at_least=1, why="a trial is a short training")
    if not train_batches or not validation_batches:
        raise ValueError("The greedy search needs at least one training and one validation batch.")
    if current_ranks().size > 1:
        raise ValueError("The greedy search runs in one process: search there, and train the set with 'fixed:' here.")
    if find_adalora(model):
        raise ValueError(
            "The greedy search does not go with AdaLoRA, whose ranks its trials would allocate: take LoRA."
        )


class Trials:
    """Short trainings of some layers, each from the same start on the same batches.

    Args:
        tuner: of the model.
        train_batches: each trial goes through them from the first on, again and again.
        validation_batches: each trial is judged on them.
        num_steps: optimizer steps of a trial.
        learning_rate: of AdamW, at all steps.
        weight_decay: of AdamW.
        loss_function: `(model, batch) -> loss`, a scalar in nats.
        autocast: the type to compute in; None is that of the weights.
    """

    def __init__(
        self,
        tuner: SparseTuner,
        train_batches: Sequence[Mapping[str, Any]],
        validation_batches: Sequence[Mapping[str, Any]],
        num_steps: int,
        learning_rate: float,
        weight_decay: float,
        loss_function: LossFunction,
        autocast: torch.dtype | None,
    ) -> None:
        self._tuner, self._device = tuner, tuner.device
        self._train_batches, self._validation_batches = train_batches, validation_batches
        self._num_steps, self._loss_function = num_steps, loss_function
        self._trained = [parameter for parameter in tuner.model.parameters() if parameter.requires_grad]
        self._options: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
        self._computing: dict[str, Any] = {
            "device_type": self._device.type,
            "dtype": autocast or torch.bfloat16,
            "enabled": autocast is not None,
        }
        self._saved = [(tensor, tensor.detach().clone()) for tensor in (*self._trained, *tuner.model.buffers())]

    def loss_of(self, candidate: tuple[int, ...]) -> float:
        """The mean loss on the held-out batches after a training of the layers `candidate`."""
        tuner = self._tuner
        tuner.selector = FixedSelector(tuner.config, len(tuner.layers), candidate)
        self.put_back()
        tuner.model.train()
        with private_randomness(keyed_seed(tuner.config.seed, "trial", 0), self._device):
            self._train()
            with torch.no_grad(), evaluation_mode(tuner.model):
                losses = [float(self._loss(batch)) for batch in self._validation_batches]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the model the values of before, and no gradient."""
        for tensor, value in self._saved:
            tensor.copy_(value)
            tensor.grad = None

    def _train(self) -> None:
        optimizer = torch.optim.AdamW(self._trained, **self._options)
        self._tuner.attach_optimizer(optimizer)
        for step in range(self._num_steps):
            self._tuner.begin_step()
            self._loss(self._train_batches[step % len(self._train_batches)]).backward()
            optimizer.step()
            optimizer.zero_grad()
            self._tuner.end_step(optimizer)

    def _loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        with torch.autocast(**self._computing):
            return self._loss_function(self._tuner.model, to_device(batch, self._device))
