"""The sizes of adapters: which settings of a kind hold its rank, and the rank that spends a number of parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..method.ranks import RankedModule, share_ranks
from .outline import Outline, adapted_modules

__all__ = ["SIZES", "SizeFields", "largest_size", "method_of", "resized", "shared_ranks"]


@dataclass(frozen=True)
class SizeFields:
    """Where a kind of adapter keeps its size."""

    rank: str
    """The field of its rank or width."""
    alpha: str | None
    """The field of the number whose ratio to the rank is the factor on the response."""
    by_module: bool = False
    """Whether single modules may have others, by `rank_pattern` and `alpha_pattern`, and each rank adds as many
    parameters."""


SIZES = {
    "LORA": SizeFields("r", "lora_alpha", by_module=True),
    "LOHA": SizeFields("r", "alpha", by_module=True),
    "LOKR": SizeFields("r", "alpha"),
    "ADALORA": SizeFields("init_r", "lora_alpha"),
    "BOTTLENECK": SizeFields("bottleneck_size", None),
}
"""The kinds whose rank can be moved. Others keep their size: it is no rank (IA3, LN tuning), or a larger one adds
nothing or little that trains (VeRA, RandLoRA, OFT)."""


def method_of(peft_config: Any) -> str:
    """The name of a configuration's method in PEFT, such as `LORA`."""
    return str(getattr(peft_config.peft_type, "value", peft_config.peft_type))


def resized(peft_config: Any, rank: int, alpha: float | None) -> Any:
    """A copy of a configuration with one rank for all modules.

    AdaLoRA's target rank grows as its first one, and so does that of LoRA beside bottlenecks. A bottleneck's factor is
    not a ratio: `alpha` replaces its `scaling`.
    """
    config = copy.deepcopy(peft_config)
    fields = SIZES[method_of(config)]
    before = getattr(config, fields.rank)
    setattr(config, fields.rank, rank)
    if hasattr(config, "target_r"):
        config.target_r = max(1, round(config.target_r * rank / before))
    if getattr(config, "lora_modules", None):
        own, config.lora_r = config.lora_r, max(1, round(config.lora_r * rank / before))
        if alpha is not None:
            config.lora_alpha *= config.lora_r / own * alpha / config.scaling
    if alpha is not None:
        setattr(config, fields.alpha or "scaling", alpha)
    return config


def shared_ranks(
    model: nn.Module,
    peft_config: Any,
    full: Outline,
    kept: Sequence[int],
    weights: dict[str, float] | None = None,
) -> dict[str, int]:
    """Ranks of the modules of the layers `kept` with which as many parameters train as in all layers, see
    `ist.method.ranks.share_ranks`; for kinds whose modules have ranks of their own.
    """
    modules = [module for module in full.modules if module.layer in kept]
    per_rank = parameters_per_rank(model, peft_config, full)
    ranked = {m.name: RankedModule(m.rank or 1, per_rank[m.name], m.largest_rank) for m in modules}
    constant = sum(m.num_parameters - per_rank[m.name] * (m.rank or 1) for m in modules)
    return share_ranks(ranked, full.num_parameters - constant, weights)


def parameters_per_rank(model: nn.Module, peft_config: Any, full: Outline) -> dict[str, int]:
    """How many parameters one more rank adds to each module, from what PEFT makes of it."""
    one_more = resized(peft_config, getattr(peft_config, SIZES[method_of(peft_config)].rank) + 1, None)
    one_more.rank_pattern = {key: rank + 1 for key, rank in (one_more.rank_pattern or {}).items()}
    after = {module.name: module.num_parameters for module in adapted_modules(model, one_more)}
    return {module.name: after[module.name] - module.num_parameters for module in full.modules}


def largest_size(model: nn.Module, peft_config: Any, full: Outline, kept: Sequence[int]) -> int:
    """The largest rank of all modules of the layers `kept` with which no more parameters train than in all layers."""
    own = {module.name for module in full.modules if module.layer in kept}
    before = getattr(peft_config, SIZES[method_of(peft_config)].rank)

    def fits(size: int) -> bool:
        modules = adapted_modules(model, resized(peft_config, size, None))
        return sum(module.num_parameters for module in modules if module.name in own) <= full.num_parameters

    low, high = before, before * math.ceil(2 * len(full.layers) / len(kept))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
