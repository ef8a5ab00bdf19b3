"""Which projections of a model a placement means, told by the ends of their modules' names. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Literal

__all__ = [
    "ATTENTION_OUTPUT",
    "MLP_GATE",
    "MLP_INPUT",
    "MLP_OUTPUT",
    "PLACEMENT_MODES",
    "Mode",
    "Placement",
    "ends_found",
    "ends_with",
    "placement_targets",
]

Mode = Literal["series", "parallel"]
Placement = Literal["paper", "houlsby", "pfeiffer", "he"]

PLACEMENT_MODES: dict[str, tuple[Mode, ...]] = {
    "paper": ("series", "parallel"),
    "houlsby": ("series",),
    "pfeiffer": ("series",),
    "he": ("parallel",),
}

# Ends of module names. A fused gate-and-up projection counts as Up: the gate then shares its adapter.
MLP_INPUT = (
    "up_proj",
    "gate_up_proj",
    "fc_in",
    "fc1",
    "mlp.c_fc",
    "dense_h_to_4h",
    "intermediate.dense",
    "DenseReluDense.wi",
    "DenseReluDense.wi_1",
    "ffn.lin1",
)
MLP_GATE = ("gate_proj", "DenseReluDense.wi_0")
MLP_OUTPUT = (
    "down_proj",
    "fc_out",
    "fc2",
    "mlp.c_proj",
    "dense_4h_to_h",
    "output.dense",
    "DenseReluDense.wo",
    "ffn.lin2",
)
# The ends say `attn`, since heads of classifiers have an `out_proj` too. BERT's `attention.output.dense` also ends as
# its MLP's output does: what ends in one of these names is never an MLP's.
ATTENTION_OUTPUT = (
    "o_proj",
    "attn.out_proj",
    "self_attn.out_proj",
    "encoder_attn.out_proj",
    "attention.out_proj",
    "attn.c_proj",
    "crossattention.c_proj",
    "attention.dense",
    "self_attention.dense",
    "self_attn.dense",
    "attention.output.dense",
    "crossattention.output.dense",
    "SelfAttention.o",
    "EncDecAttention.o",
    "attention.out_lin",
)
MLP = (*MLP_INPUT, *MLP_GATE, *MLP_OUTPUT)

# What a placement consists of, by mode: groups of names of which each must occur, then names that may occur.
GROUPS: dict[tuple[str, str], tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]] = {
    ("series", "paper"): ((MLP_INPUT, MLP_OUTPUT), ()),
    ("parallel", "paper"): ((MLP_INPUT,), MLP_GATE),
    ("series", "houlsby"): ((ATTENTION_OUTPUT, MLP_OUTPUT), ()),
    ("series", "pfeiffer"): ((MLP_OUTPUT,), ()),
}


def ends_with(name: str, ends: Iterable[str]) -> bool:
    """Whether the last components of a module's dotted name are one of `ends`."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def ends_found(names: Iterable[str], ends: Iterable[str]) -> set[str]:
    """Those of `ends` in which one of the names ends."""
    names = list(names)
    return {end for end in ends if any(ends_with(name, (end,)) for name in names)}


def placement_targets(names: Iterable[str], mode: str, placement: str) -> tuple[list[str], list[str]]:
    """The modules that a placement means in a model.

    Args:
        names: dotted names of the model's linear modules.
        mode: `series` or `parallel`.
        placement: `paper`, `houlsby`, `pfeiffer` or `he`.

    Returns:
        The ends of their names, sorted, empty if the model lacks a part that the placement needs; and the ends of
        other names that end in these as well, which are not meant.
    """
    names = list(names)
    if placement == "he":
        return mlp_names(names), []
    required, optional = GROUPS[mode, placement]
    attention = [name for name in names if ends_with(name, ATTENTION_OUTPUT)]
    others = [name for name in names if name not in set(attention)]
    found = [ends_found(attention if group is ATTENTION_OUTPUT else others, group) for group in required]
    if not all(found):
        return [], []
    targets = set().union(*found, ends_found(others, optional))
    alike = [] if ATTENTION_OUTPUT in required else [name for name in attention if ends_with(name, targets)]
    return sorted(targets), sorted(ends_found(alike, ATTENTION_OUTPUT))


def mlp_names(names: Iterable[str]) -> list[str]:
    """The last names of the modules that hold the linear modules of one MLP, and no other linear modules."""
    children: dict[str, list[str]] = {}
    holds_others: set[str] = set()
    for name in names:
        children.setdefault(name.rpartition(".")[0], []).append(name)
        if not ends_with(name, MLP):
            holds_others.update(accumulate(name.split("."), "{}.{}".format))
    found = [
        parent
        for parent, inside in children.items()
        if ends_found(inside, MLP_INPUT) and ends_found(inside, MLP_OUTPUT) and parent not in holds_others
    ]
    return sorted({parent.rpartition(".")[2] for parent in found if parent})
