"""The adapter that `--adapter` and its flags describe."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from trl import ModelConfig, get_peft_config

from ...bottleneck import BottleneckConfig
from ...config import check_whole
from .adapter_files import config_from_file, config_of_type, peft_types
from .methods import ADAPTERS, BOTTLENECKS, PLACEMENTS

__all__ = ["adapter_config"]


def adapter_config(ist: Any, model: ModelConfig, num_steps: int) -> Any:
    """PEFT's configuration of the adapter, or None without one.

    Args:
        ist: this library's arguments.
        model: TRL's arguments of the model and of LoRA.
        num_steps: optimizer steps of the training, which AdaLoRA's schedule ends with.

    Raises:
        ValueError: an option of the adapter is not allowed.
    """
    if ist.adapter == "none":
        return None
    if ist.adapter not in ADAPTERS:
        return config_of_type(ist.adapter) if ist.adapter in peft_types() else config_from_file(ist.adapter)
    if ist.adapter in BOTTLENECKS:
        placement: Any = ist.adapter if ist.adapter in PLACEMENTS else None
        return BottleneckConfig(
            mode="parallel" if ist.adapter in ("parallel", "he") else "series",
            placement=placement,
            bottleneck_size=ist.bottleneck_size,
            non_linearity=ist.bottleneck_non_linearity,
            dropout=ist.bottleneck_dropout,
            sparsity=ist.bottleneck_sparsity,
            target_modules=None if placement else ist.bottleneck_target_modules,
            modules_to_save=model.lora_modules_to_save,
            task_type=model.lora_task_type,
        )
    if ist.adapter == "adalora":
        return adalora_config(ist, model, num_steps)
    options = dataclasses.replace(model, use_peft=True, use_dora=model.use_dora or ist.adapter == "dora")
    options.lora_target_modules = target_modules(model)
    return get_peft_config(options)


def target_modules(model: ModelConfig) -> Any:
    """The modules that LoRA is put on: all linear ones of the layers, unless others are named.

    One name is a name: TRL makes a bare text of a list of one, and PEFT reads a text as a regular expression that has
    to match a module's whole path, which the last part of it never does.
    """
    named: Any = model.lora_target_modules
    if named is None:
        return "all-linear" if model.lora_target_parameters is None else None
    is_name = isinstance(named, str) and named != "all-linear" and re.fullmatch(r"[\w.]+", named)
    return [named] if is_name else named


def adalora_config(ist: Any, model: ModelConfig, num_steps: int) -> Any:
    """AdaLoRA, which begins at one and a half times the rank that is left in the mean, as its authors' runs do.

    Raises:
        ValueError: the parts of its schedule do not fit into the training.
    """
    from peft import AdaLoraConfig

    warmup = num_steps // 10 if ist.adalora_warmup_steps is None else ist.adalora_warmup_steps
    final = 3 * num_steps // 10 if ist.adalora_final_steps is None else ist.adalora_final_steps
    initial = ist.adalora_init_r or max(model.lora_r + 1, 3 * model.lora_r // 2)
    for name, value in (("adalora_warmup_steps", warmup), ("adalora_final_steps", final)):
        check_whole(name, value, at_least=0, why="it counts optimizer steps")
    check_whole("adalora_interval", ist.adalora_interval, at_least=1, why="it counts optimizer steps")
    check_whole("adalora_init_r", initial, at_least=model.lora_r, why="ranks only go, down to lora_r in the mean")
    if warmup + final >= num_steps:
        raise ValueError(
            f"AdaLoRA's {warmup} steps before its first allocation and {final} after its last one leave none of "
            f"{num_steps} between them: give less of --adalora_warmup_steps and --adalora_final_steps, or more "
            "--max_steps."
        )
    return AdaLoraConfig(
        task_type=model.lora_task_type,
        init_r=initial,
        target_r=model.lora_r,
        tinit=warmup,
        tfinal=final,
        deltaT=ist.adalora_interval,
        total_step=num_steps,
        target_modules=target_modules(model),
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        modules_to_save=model.lora_modules_to_save,
    )
