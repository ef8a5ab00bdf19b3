"""Write the choice of layers and ranks into a PEFT configuration, and make sure that PEFT reads it so.

PEFT ignores keys of `rank_pattern` that match nothing, takes no `layers_to_transform` beside a regular expression, and
the same number in both stacks of an encoder-decoder. So what was written is compared with what PEFT makes of it, and
where they differ every module is named in full.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from logging import getLogger
from typing import Any, Literal

from torch import nn

from ..method.ranks import SCALING_EXPONENTS, layer_weights, scaled_alpha
from .outline import AdaptedModule, Outline, adapted_modules
from .sizes import SIZES, largest_size, method_of, resized, shared_ranks

__all__ = ["Rank", "narrowed", "write_config"]

logger = getLogger(__name__)

Rank = Literal["moved", "kept", "uneven"] | int
"""How the rank of a focused configuration follows from that of the given one."""


def write_config(
    model: nn.Module,
    peft_config: Any,
    full: Outline,
    kept: Sequence[int],
    rank: Rank,
    scaling: str,
    scores: Sequence[float],
) -> Any:
    """The configuration that adapts the layers `kept` alone, with ranks as `rank` and `scaling` say.

    Args:
        model: without adapters.
        peft_config: the configuration for all layers; not changed.
        full: its outline.
        kept: indices of the outline's layers, ascending.
        rank: see `ist.focusing.find_focus`.
        scaling: likewise.
        scores: the importance of each layer, for `uneven`.

    Raises:
        ValueError: the ranks of this kind cannot be uneven.
    """
    method = method_of(peft_config)
    fields = SIZES.get(method)
    if fields is None or rank == "kept":
        if rank != "kept":
            logger.warning("%s has no rank that could be moved, so its adapters keep their size.", method)
        return narrowed(model, peft_config, full, kept)
    if fields.by_module:
        ranks = new_ranks(model, peft_config, full, kept, rank, scores)
        return narrowed(model, peft_config, full, kept, with_alphas(full, ranks, peft_config, scaling))
    if rank == "uneven":
        raise ValueError(f"rank='uneven' needs ranks by module, which {method} lacks: take rank='moved'.")
    before = getattr(peft_config, fields.rank)
    new = rank if isinstance(rank, int) else largest_size(model, peft_config, full, kept)
    if fields.alpha is None:
        factor = peft_config.scaling * (new / before) ** -SCALING_EXPONENTS[scaling]
    else:
        factor = scaled_alpha(getattr(peft_config, fields.alpha), before, new, scaling)
    return narrowed(model, resized(peft_config, new, factor), full, kept)


def new_ranks(
    model: nn.Module, peft_config: Any, full: Outline, kept: Sequence[int], rank: Rank, scores: Sequence[float]
) -> dict[str, int]:
    """The rank of each module of the layers `kept` by name, for kinds that take them by module."""
    modules = [module for module in full.modules if module.layer in kept]
    if isinstance(rank, int):
        return {module.name: min(rank, module.largest_rank) for module in modules}
    by_layer = dict(zip(kept, layer_weights([scores[layer] for layer in kept]), strict=True))
    weights = {m.name: by_layer[m.layer] for m in modules if m.layer is not None} if rank == "uneven" else None
    return shared_ranks(model, peft_config, full, kept, weights)


def with_alphas(
    full: Outline, ranks: Mapping[str, int], peft_config: Any, scaling: str
) -> dict[str, tuple[int, float]]:
    """The ranks with the alpha that each brings with it, as `scaling` says."""
    root = bool(getattr(peft_config, "use_rslora", False))
    before = {module.name: module for module in full.modules if module.name in ranks}
    return {
        name: (ranks[name], scaled_alpha(m.alpha or 1, m.rank or 1, ranks[name], scaling, root))
        for name, m in before.items()
    }


def narrowed(
    model: nn.Module,
    peft_config: Any,
    full: Outline,
    kept: Collection[int],
    ranks: Mapping[str, tuple[int, float]] | None = None,
) -> Any:
    """The configuration that adapts the layers `kept` alone.

    Args:
        model: without adapters.
        peft_config: the configuration for all layers; not changed.
        full: its outline.
        kept: indices of the outline's layers. Modules outside of layers are kept too.
        ranks: rank and alpha of each module by name, for kinds that take them by module; None leaves them.

    Raises:
        ValueError: PEFT would not adapt these modules with these ranks, whatever is written.
    """
    wanted = {module.name: module for module in full.modules if module.layer is None or module.layer in kept}
    differences = ""
    for targets in (by_number, by_name, by_expression):
        config = targets(copy.deepcopy(peft_config), full, kept, list(wanted))
        if config is None:
            continue
        if ranks is not None:
            write_ranks(config, wanted, ranks)
        try:
            differences = compare(adapted_modules(model, config), wanted, ranks)
        except ValueError as error:  # PEFT finds no number in the names of a stack that is the model's own attribute.
            differences = str(error)
        if not differences:
            return config
    raise ValueError(f"PEFT does not read the focused configuration as it was meant: {differences}.")


def by_number(config: Any, full: Outline, kept: Collection[int], names: list[str]) -> Any:
    """Layers by `layers_to_transform`, modules by the ends of their names; None where the method has no such field."""
    if not hasattr(config, "layers_to_transform"):
        return None
    numbers = {full.layers[layer].rpartition(".")[2] for layer in kept}
    if not all(number.isdecimal() for number in numbers):
        return None
    config.layers_to_transform = sorted(map(int, numbers))
    ends = full.target_modules
    config.target_modules = sorted(
        {name.rpartition(".")[2] for name in names} if ends is None or isinstance(ends, str) else ends
    )
    drop_placement(config)
    return config


def by_name(config: Any, full: Outline, kept: Collection[int], names: list[str]) -> Any:
    """Every module by its full name."""
    if ends := getattr(config, "feedforward_modules", None):  # IA3's, which have to be among the targets
        whole = [name for name in names if any(f".{name}".endswith(f".{end}") for end in ends)]
        config.feedforward_modules = ends if isinstance(ends, str) else whole
    config.target_modules = names
    drop_layers(config)
    return config


def by_expression(config: Any, full: Outline, kept: Collection[int], names: list[str]) -> Any:
    """Every module by its full name in a regular expression, where a name is also the end of another."""
    config.target_modules = "|".join(re.escape(name) for name in names)
    drop_layers(config)
    return config


def drop_layers(config: Any) -> None:
    """Full names leave nothing to choose by number."""
    for field in ("layers_to_transform", "layers_pattern"):
        if hasattr(config, field):
            setattr(config, field, None)
    drop_placement(config)


def drop_placement(config: Any) -> None:
    """A bottleneck's placement has found its modules."""
    if hasattr(config, "placement"):
        config.placement = None


def write_ranks(config: Any, modules: Mapping[str, AdaptedModule], ranks: Mapping[str, tuple[int, float]]) -> None:
    """The commonest rank for all, the others by pattern: by the ends of names where all of an end agree."""
    fields = SIZES[method_of(config)]
    sizes = {name: ranks.get(name) or (module.rank, module.alpha) for name, module in modules.items()}
    sizes = {name: size for name, size in sizes.items() if size[0] is not None}  # Trainable tokens have no rank.
    (rank, alpha), _ = Counter(sizes.values()).most_common(1)[0]
    setattr(config, fields.rank, rank)
    setattr(config, str(fields.alpha), alpha)
    by_end: dict[str, set[Any]] = {}
    for name, size in sizes.items():
        by_end.setdefault(name.rpartition(".")[2], set()).add(size)
    patterns: dict[str, tuple[Any, Any]] = {}
    for name, size in sizes.items():
        end = name.rpartition(".")[2]
        key = end if len(by_end[end]) == 1 else name
        if size != (rank, alpha):
            patterns[key] = size
    config.rank_pattern = {key: r for key, (r, _) in patterns.items() if r != rank}
    config.alpha_pattern = {key: a for key, (_, a) in patterns.items() if a != alpha}


def compare(
    found: list[AdaptedModule], wanted: Mapping[str, AdaptedModule], ranks: Mapping[str, tuple[int, float]] | None
) -> str:
    """In words how PEFT's reading differs from what was meant; nothing where it does not."""
    names = {module.name for module in found}
    if missing := set(wanted) - names:
        return f"{min(missing)} would get no adapter"
    if extra := names - set(wanted):
        return f"{min(extra)} would get an adapter too"
    for module in found:
        size = (ranks or {}).get(module.name)
        if size is not None and (module.rank, module.alpha) != size:
            return f"{module.name} would have rank {module.rank} and alpha {module.alpha} instead of {size}"
    return ""
