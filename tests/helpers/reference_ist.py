"""Importance-aware Sparse Tuning the naive way, straight from the paper's equations (and the authors' code).

It shares nothing with the library but the source of random numbers: plain lists and loops, every adapter toggled by
name, every response scaled by hand. The library must agree with it to the last bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ist.runtime.randomness import keyed_generator
from tests.helpers.tiny import layer_of


def sigmoid(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).sigmoid().item()


class ReferenceIST:
    def __init__(
        self, model: Any, num_layers: int, num_active: int, num_drawn: int, preset: str, **config: Any
    ) -> None:
        self.model, self.num_layers, self.num_active, self.num_drawn = model, num_layers, num_active, num_drawn
        self.authors = preset == "authors"
        self.config = config
        # The authors keep scores of unimportance; the paper keeps scores of importance.
        self.scores = [0.0] * num_layers
        self.scaling = {n: dict(m.scaling) for n, m in model.named_modules() if hasattr(m, "lora_A")}

    def importance(self) -> list[float]:
        return [-score for score in self.scores] if self.authors else list(self.scores)

    def draw(self, importance: list[float], num: int, generator: torch.Generator) -> list[int]:
        uniform = torch.rand(self.num_layers, generator=generator, dtype=torch.float64).tolist()
        keys = []
        for u, score in zip(uniform, importance, strict=True):
            if self.authors:  # without replacement, in proportion to sigmoid: the race of exponential clocks
                keys.append(sigmoid(score) / -math.log(u))
            else:  # eq. 6
                keys.append(u * sigmoid(score))
        ranked = sorted(range(self.num_layers), key=lambda i: -keys[i])
        return sorted(ranked[:num])  # eq. 7

    def active(self, step: int) -> list[int]:
        return self.draw(self.importance(), self.num_active, keyed_generator(self.config["seed"], "active", step))

    def freeze_all_but(self, active: list[int]) -> None:
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(layer_of(name) in active)

    def scale(self, suppressed: list[int]) -> None:
        for name, module in self.model.named_modules():
            if name in self.scaling:
                factor = self.config["beta"] if layer_of(name) in suppressed else 1.0
                module.scaling["default"] = self.scaling[name]["default"] * factor

    def update(self, step: int, batch: dict[str, Any]) -> None:
        generator = keyed_generator(self.config["seed"], "candidates", step)
        drawn: list[list[int]] = []
        while len(drawn) < self.config["num_candidates"]:
            scores = [-i for i in self.importance()] if self.authors else self.importance()
            candidate = self.draw(scores, self.num_drawn, generator)
            if candidate not in drawn:
                drawn.append(candidate)
        likelihoods = []
        self.model.eval()
        for candidate in drawn:
            outside = [i for i in range(self.num_layers) if i not in candidate]
            self.scale(candidate if self.authors else outside)  # eq. 8
            with torch.no_grad():
                likelihoods.append((-self.model(**batch).loss.double()).exp())
        self.scale([])
        self.model.train()
        mean = torch.stack(likelihoods).mean()
        before = self.importance()  # p(1 − p) is the same for a score and its negative
        for candidate, likelihood in zip(drawn, likelihoods, strict=True):
            reward = (likelihood - mean).item()  # eq. 9
            for i in candidate:  # eq. 10
                p = sigmoid(before[i])
                self.scores[i] += self.config["mu"] * (p * (1 - p) if self.authors else 1.0) * reward
