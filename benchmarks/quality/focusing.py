"""Methods that keep some of the layers: the configuration that `ist.focusing` chooses before the training, and the warm
start, which trains all layers for the first steps and continues with those that it finds important.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ist import discover_layers, layer_scores
from ist.adapters.outline import outline
from ist.focusing import Focus, find_focus, gradient_init
from ist.method.spreading import choose_layers

__all__ = ["WarmStart", "chosen_focus", "freeze_others", "start_adapters"]

PROBE_BATCHES = 4
"""Batches of the training's size that a probe reads."""


def chosen_focus(
    model: nn.Module,
    config: Any,
    options: Mapping[str, Any],
    batches: Iterable[Mapping[str, Any]],
    seed: int,
) -> tuple[Any, dict[str, Any]]:
    """The configuration of a focused training, and what the result line says of it.

    Args:
        model: without adapters.
        config: of all layers.
        options: of `ist.focusing.find_focus`, and some of this benchmark: `criterion: random` draws the scores from the
            seed; `normalise` divides the gradient by the squared norm of its layer's adapted `weights` or by that of
            the layer's output (`activations`, the first name of `criterion: relative_gradient`); `last` is a factor on
            the last layer's.
        batches: for the probe.
        seed: of the probe, and of random scores.
    """
    own = dict(options)
    normalise, last, criterion = own.pop("normalise", None), own.pop("last", None), own.get("criterion", "gradient")
    if (normalise, criterion) == ("activations", "gradient"):
        normalise, criterion = None, "relative_gradient"
        own["criterion"] = criterion
    if criterion == "random":
        del own["criterion"]
        own["scores"] = random_scores(len(outline(model, config).layers), seed)
    elif normalise is not None or last is not None:
        batches = list(batches)
        scores = layer_scores(model, config, batches, criterion=criterion, num_batches=PROBE_BATCHES, seed=seed)
        sizes = layer_sizes(model, config, normalise)
        own["scores"] = [score / size for score, size in zip(scores, sizes, strict=True)]
        own["scores"][-1] *= 1.0 if last is None else last
    focus = find_focus(model, config, batches, num_batches=PROBE_BATCHES, seed=seed, **own)
    return focus.config, described(focus)


def start_adapters(model: nn.Module, init: str, batches: Sequence[Mapping[str, Any]], seed: int) -> None:
    """Start LoRA as a method's `init` says: as PEFT draws it (`random`), or from the `gradient` of these batches.

    Raises:
        ValueError: it says something else.
    """
    if init not in ("random", "gradient"):
        raise ValueError(f"init={init!r} is unknown: it is random or gradient.")
    if init == "gradient":
        gradient_init(model, batches, num_batches=PROBE_BATCHES, seed=seed)


def described(focus: Focus) -> dict[str, Any]:
    """What a result line keeps of a focus."""
    ranks = sorted(set(focus.ranks.values()))
    return {
        "layers": list(focus.layers),
        "ranks": ranks,
        "alpha": focus.config.lora_alpha,
        "scores": focus.scores and [float(f"{score:.6g}") for score in focus.scores],
        "parameters": [focus.num_parameters, focus.num_parameters_before],
        "seconds": round(focus.seconds, 3),
    }


def random_scores(num_layers: int, seed: int) -> list[float]:
    """Scores that choose a random set."""
    generator = random.Random(f"random layers {seed}")
    return [generator.random() for _ in range(num_layers)]


def layer_sizes(model: nn.Module, config: Any, of: str | None) -> list[float]:
    """What the score of each layer is divided by: 1 everywhere where `of` is None.

    Raises:
        ValueError: `of` is unknown.
    """
    found = outline(model, config)
    if of is None:
        return [1.0] * len(found.layers)
    if of != "weights":
        raise ValueError(f"normalise={of!r} is unknown: it is weights, with the gradient activations, or left out.")
    sizes = [0.0] * len(found.layers)
    for module in found.modules:
        if module.layer is not None:
            weight: Any = model.get_submodule(module.name).weight
            sizes[module.layer] += float(weight.detach().float().square().sum())
    return sizes


class WarmStart:
    """All layers with adapters for the first steps, then those that matter; the others keep what they have learned.

    Of a model without a focus this is a warm start with all layers; of a focused one a second choice among its layers.

    Args:
        options: `share` of the steps before the choice, `num_layers` as a fraction, `spread`, and `criterion` `gate` or
            `removal`.
        steps: of the training.
    """

    def __init__(self, options: Mapping[str, Any], steps: int) -> None:
        self.options = {"share": 0.1, "num_layers": 0.5, "spread": "parts", "criterion": "gate", **options}
        self.last_step = max(1, round(self.options["share"] * steps))
        """The last step before the choice."""

    def narrow(self, model: Any, batches: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
        """Measure, choose and freeze; returns what the result line says of it."""
        criterion = self.options["criterion"]
        scores = layer_scores(model, None, batches, criterion=criterion, num_batches=PROBE_BATCHES, seed=seed)
        num = max(1, round(self.options["num_layers"] * len(scores)))
        chosen = choose_layers(scores, num, self.options["spread"])
        numbers = [int(layer.name.rpartition(".")[2]) for layer in discover_layers(model)]
        freeze_others(model, chosen)
        return {
            "layers": [numbers[index] for index in chosen],
            "scores": [float(f"{x:.6g}") for x in scores],
            "after": self.last_step,
        }


def freeze_others(model: Any, chosen: Sequence[int]) -> None:
    """Let the adapters of all other layers stay as they are, without gradients that would move them."""
    for layer in discover_layers(model):
        if layer.index not in chosen:
            for parameter in layer.module.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None
