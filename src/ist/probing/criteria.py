"""The importance of each layer by a criterion: of a model without adapters yet, or of adapters trained a little."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from ..adapters.layers import Layer, discover_layers, find_adapters
from ..adapters.outline import AdaptedModule, Outline, outline
from ..config import check_choice, check_loss_function, check_seed, check_whole, with_checked_keywords
from ..runtime.distributed import current_ranks
from ..runtime.randomness import private_randomness
from ..runtime.sharding import compute_device
from .gradients import ModuleGradient, Target, adapter_gradients, take_batches
from .outputs import OutputNorms, output_norms
from .suppression import LossFunction, agreed, model_loss
from .trained import gate_scores, removal_scores

__all__ = ["CRITERIA", "TRAINED", "Criterion", "check_measurement", "check_num_batches", "layer_scores", "scores_of"]

Criterion = Literal["gradient", "relative_gradient", "first_step", "activation", "gate", "removal"]
CRITERIA: dict[str, str] = {
    "gradient": "squared norm of the loss's gradient by the adapters' weights at their start",
    "relative_gradient": "that squared norm divided by the square of the mean norm of a token's output of the layer",
    "first_step": "loss that the first step of Adam would save: the sum of the gradient's absolute values",
    "activation": "mean norm of a token's output of the layer",
    "gate": "loss that the layer's trained adapters save, estimated by the gradient of a factor on their response",
    "removal": "loss that the layer's trained adapters save: the difference without them",
}
"""What each criterion measures; the last two are of a model whose adapters were trained a little."""
TRAINED = ("gate", "removal")
"""Those that need adapters that were trained a little."""
PROBE_RANK = 32
"""Rank of the gradient for kinds of adapters without one."""


@with_checked_keywords
def layer_scores(
    model: nn.Module,
    peft_config: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    criterion: Criterion = "gradient",
    num_batches: int = 4,
    layers: str | Sequence[str] | None = None,
    loss_function: LossFunction | None = None,
    seed: int = 0,
) -> tuple[float, ...]:
    """The importance of each layer, larger is more important; of several processes, the mean over ranks.

    Args:
        model: the base model, with `peft_config`; or for `gate` and `removal` a PEFT model whose adapters were trained
            a little, with `peft_config=None`. It is left as it was.
        peft_config: what you would train all layers with.
        batches: batches of the training data, of which at most `num_batches` are read.
        criterion: see `CRITERIA`.
        num_batches: at least 1.
        layers: the stack of blocks, where the model has several: see `discover_layers`.
        loss_function: `(model, batch) -> loss` in nats; `model(**batch).loss` if None.
        seed: of the gradient's random matrices.

    Returns:
        A score for each layer that gets adapters, in the order of the forward pass.

    Raises:
        ValueError: an argument is outside what is allowed, or the loss says nothing of the layers.
        TypeError: an argument is unknown.
    """
    check_measurement(criterion, num_batches, loss_function, seed)
    if criterion in TRAINED:
        if peft_config is not None or not find_adapters(model):
            raise ValueError(
                f"criterion={criterion!r} measures adapters that were trained a little: give a PEFT model and "
                "peft_config=None, or before training criterion='gradient'."
            )
        found = discover_layers(model, layers)
        return trained_scores(model, found, batches, criterion, num_batches, loss_function, seed)
    full = outline(model, peft_config, layers)
    return scores_of(model, full, peft_config, batches, criterion, num_batches, loss_function, seed)


def scores_of(
    model: nn.Module,
    full: Outline,
    peft_config: Any,
    batches: Iterable[Mapping[str, Any]],
    criterion: Criterion,
    num_batches: int,
    loss_function: LossFunction | None,
    seed: int,
) -> tuple[float, ...]:
    """The scores of the layers of an outline, by a criterion that needs no trained adapters."""
    if criterion in TRAINED:
        raise ValueError(
            f"criterion={criterion!r} needs adapters that were trained a little, and here are none yet: measure with "
            "layer_scores(peft_model, None, batches, criterion=…) and pass scores, or take criterion='gradient'."
        )
    blocks = [model.get_submodule(name) for name in full.layers]
    loss = loss_function or model_loss
    if criterion == "activation":
        found = output_norms(model, blocks, batches, num_batches=num_batches, loss_function=loss, seed=seed)
        return finite(full.layers, current_ranks().mean(found))
    targets = {module.name: target_of(module, peft_config) for module in full.modules if module.layer is not None}
    norms = OutputNorms(model, blocks) if criterion == "relative_gradient" else None
    gradients = adapter_gradients(
        model,
        targets,
        batches,
        num_batches=num_batches,
        blocks=blocks,
        seed=seed,
        loss_function=loss,
        beside=[] if norms is None else [norms],
    )
    sums = current_ranks().mean(layer_sums(full, gradients, "absolute" if criterion == "first_step" else "squared"))
    if norms is not None:
        sums = relative(full.layers, sums, current_ranks().mean(norms.means()))
    return finite(full.layers, sums)


def layer_sums(
    full: Outline, gradients: Mapping[str, ModuleGradient], of: Literal["squared", "absolute"]
) -> list[float]:
    """The sum over the adapted modules of each layer."""
    sums = [0.0] * len(full.layers)
    for module in full.modules:
        if module.layer is not None:
            gradient = gradients[module.name]
            sums[module.layer] += gradient.squared_norm if of == "squared" else gradient.absolute_sum
    return sums


def relative(names: Sequence[str], squares: Sequence[float], norms: Sequence[float]) -> list[float]:
    """Squared gradients, each divided by the square of its layer's norm; 0 of a layer that has not run.

    Raises:
        ValueError: a norm is not finite, or 0 though there is a gradient.
    """
    for name, square, norm in zip(names, squares, norms, strict=True):
        if not math.isfinite(norm) or (norm == 0 and square != 0):
            raise ValueError(
                f"The mean norm of a token's output of {name} is {norm:g}, and criterion='relative_gradient' divides "
                "by its square, which has to be positive and finite: give other batches or a higher precision, or "
                "choose criterion='gradient'."
            )
    return [square / norm**2 if norm else 0.0 for square, norm in zip(squares, norms, strict=True)]


def trained_scores(
    model: nn.Module,
    found: Sequence[Layer],
    batches: Iterable[Mapping[str, Any]],
    criterion: Criterion,
    num_batches: int,
    loss_function: LossFunction | None,
    seed: int,
) -> tuple[float, ...]:
    """The scores of layers whose adapters were trained a little.

    Raises:
        ValueError: a loss is not finite, or no response changes it.
    """
    measure = gate_scores if criterion == "gate" else removal_scores
    given = take_batches(batches, num_batches, seed)
    ranks = current_ranks()
    with private_randomness(seed, compute_device(model)):
        own = agreed(lambda: measure(model, found, given, loss_function or model_loss), ranks)
    scores = finite([layer.name for layer in found], ranks.mean(own))
    if not any(scores):
        raise ValueError(
            f"The loss is the same with and without the adapters of each of the {len(found)} layers, so "
            f"criterion={criterion!r} says nothing of them: train the adapters for some steps first, or measure "
            "criterion='gradient' before there are adapters."
        )
    return scores


def finite(names: Sequence[str], scores: Sequence[float]) -> tuple[float, ...]:
    """The scores.

    Raises:
        ValueError: one is NaN or infinite.
    """
    for name, score in zip(names, scores, strict=True):
        if not math.isfinite(score):
            raise ValueError(
                f"The importance of {name} is {score}, so nothing was measured: look at the batches (labels that are "
                "all ignored give a loss of NaN) and at the model's weights, or take a higher precision."
            )
    return tuple(scores)


def target_of(module: AdaptedModule, peft_config: Any) -> Target:
    """What the adapter of a module would be to the gradient probe."""
    if module.rank is None or module.alpha is None:
        return Target(rank=min(PROBE_RANK, module.largest_rank))
    root = getattr(peft_config, "use_rslora", False)
    return Target(module.rank, module.alpha / (math.sqrt(module.rank) if root else module.rank))


def check_measurement(criterion: Any, num_batches: Any, loss_function: Any, seed: Any) -> None:
    """Raise ValueError unless the options of a measurement are what is allowed."""
    check_num_batches(num_batches)
    check_choice("criterion", criterion, CRITERIA)
    check_loss_function(loss_function)
    check_seed(seed)


def check_num_batches(num_batches: int) -> None:
    """Raise ValueError unless it is a number of batches to measure on."""
    check_whole("num_batches", num_batches, at_least=1, why="importance is measured on some; four are enough")
