"""The modules and parameters that an adapter's flags or file name: each has to be in the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..nearest import did_you_mean

__all__ = ["check_named", "check_targets", "name_targets"]

WORDS = ("all-linear",)
"""What a flag may say in place of names."""


def check_targets(model: nn.Module, config: Any, flag: str) -> None:
    """Raise ValueError where a name or a regular expression finds no module that an adapter can be put on.

    PEFT itself passes over a wrong name beside a right one.

    Args:
        model: without adapters.
        config: of the adapter, None without one; its `target_modules` are names or a regular expression.
        flag: that named them.
    """
    targets = getattr(config, "target_modules", None)
    if not targets or targets in WORDS:
        return
    found = list(adaptable(model))
    last = dict.fromkeys(name.rpartition(".")[2] for name in found)
    allowed = f"the model's modules that take adapters are {', '.join(last)}"
    if isinstance(targets, str):
        try:
            matches = any(re.fullmatch(targets, name) for name in found)
        except re.error as error:
            raise ValueError(f"--{flag} {targets} is no regular expression ({error}): give names instead.") from None
        if not matches:
            raise ValueError(
                f"--{flag} {targets} matches the whole path of no module, such as {found[0] if found else 'none'}: "
                f"{allowed}."
            )
        return
    if has_fused_experts(model):
        return  # PEFT translates the names that their projections have in checkpoints.
    for target in sorted(targets):
        if target not in found and not any(name.endswith(f".{target}") for name in found):
            hint = did_you_mean(target, last)
            raise ValueError(f"--{flag} {target} is no module of this model{hint}: {allowed}.")


def name_targets(model: Any, config: Any) -> None:
    """Write out `all-linear` for (IA)³, which PEFT saves by whole paths beside the ends of names of
    `feedforward_modules`, and then refuses to load.

    Args:
        model: without adapters.
        config: of the adapter, None without one; changed in place.
    """
    if not hasattr(config, "feedforward_modules") or config.target_modules not in WORDS:
        return
    output = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    config.target_modules = {name.rpartition(".")[2] for name in linear if model.get_submodule(name) is not output}


def check_named(model: nn.Module, config: Any, where: str) -> None:
    """Raise ValueError where an adapter names modules to save, or parameters, that the model lacks.

    PEFT passes over such names, and what they were meant for is neither trained nor saved.

    Args:
        model: without adapters.
        config: of the adapter, None without one.
        where: the names come from.
    """
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    for setting, names in (("modules_to_save", modules), ("target_parameters", parameters)):
        given = getattr(config, setting, None) or ()
        if isinstance(given, str):
            raise ValueError(f'{where} sets {setting} to the text {given!r}, and it takes a list: give ["{given}"].')
        what, parts = ("module", 1) if setting == "modules_to_save" else ("parameter", 2)
        dot = (
            "" if what == "module" else "."
        )  # PEFT finds any end of a module's name, and whole parts of a parameter's.
        for named in given:
            if named not in names and not any(name.endswith(f"{dot}{named}") for name in names):
                ends = (".".join(name.split(".")[-parts:]) for name in names)
                last = dict.fromkeys(end for end in ends if not end.isdecimal())
                raise ValueError(
                    f"{where} names {named} for {setting}, and that is no {what} of this model"
                    f"{did_you_mean(named, last)}: its {what}s are {', '.join(last)}."
                )


def has_fused_experts(model: nn.Module) -> bool:
    """Whether a parameter holds the matrices of several experts."""
    return any(
        parameter.dim() == 3
        for module in model.modules()
        if not isinstance(module, _ConvNd)
        for parameter in module.parameters(False)
    )


def adaptable(model: nn.Module) -> Iterator[str]:
    """The names of modules that hold a matrix, quantised ones and attention as one module among them."""
    for name, module in model.named_modules():
        whole = isinstance(module, nn.MultiheadAttention) or not any(True for _ in module.children())
        if (
            name
            and whole
            and any(tensor.dim() >= 2 for tensor in chain(module.parameters(False), module.buffers(False)))
        ):
            yield name
