"""The PEFT tuner that puts bottleneck adapters on the modules of a model."""

from __future__ import annotations

import re
import warnings
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from .config import BottleneckConfig
from .layer import MERGE_REFUSAL, BottleneckLayer, Position
from .places import ATTENTION_OUTPUT, MLP, MLP_INPUT, MLP_OUTPUT, ends_found, ends_with, placement_targets

__all__ = ["BottleneckModel"]


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear module (plain, quantised, or transformers' Conv1D); None for other modules."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # Part of nn.MultiheadAttention, which reads its weight and never calls it.
    for names in (("in_features", "out_features"), ("nx", "nf")):
        width_in, width_out = (getattr(module, name, None) for name in names)
        if isinstance(width_in, int) and isinstance(width_out, int):
            return width_in, width_out
    return None


def mlp_widths(name: str, module: nn.Module) -> tuple[int, int] | None:
    """Width of the input of an MLP's input projection and of the output of its output projection, if it has them."""
    linear = {f"{name}.{key}": linear_widths(child) for key, child in module.named_modules()}
    width_in = next((widths[0] for key, widths in linear.items() if widths and ends_with(key, MLP_INPUT)), None)
    width_out = next((widths[1] for key, widths in linear.items() if widths and ends_with(key, MLP_OUTPUT)), None)
    return None if width_in is None or width_out is None else (width_in, width_out)


def wiring(config: BottleneckConfig, name: str, module: nn.Module) -> tuple[Position, int, int]:
    """Where the adapter of the target `module` acts, and the module's input and output width.

    Raises:
        ValueError: the module cannot carry the adapter.
    """
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    widths = linear_widths(base)
    if ends_with(name, config.lora_modules or ()):
        if widths is None:
            raise ValueError(
                f"Target {name!r} is a {type(base).__name__}, not a linear module: lora_modules takes linear ones."
            )
        position: Position = "parallel"
    elif config.mode == "series":
        position = "output" if ends_with(name, config.output_modules or ()) else "input"
    else:
        position = "parallel"
        widths = widths or mlp_widths(name, base)
    if widths is None:
        allowed = "a linear module" if config.mode == "series" else "a linear module or an MLP with known projections"
        raise ValueError(f"Target {name!r} is a {type(base).__name__}, not {allowed}: name others in target_modules.")
    if any(isinstance(part, BaseTunerLayer) for part in base.modules()):
        raise ValueError(f"Target {name!r} holds modules with adapters already: name these modules in target_modules.")
    return position, *widths


def base_names(model: nn.Module) -> dict[str, str]:
    """For each module's name its name before any adapter wrapped it; the adapters' own modules are left out."""
    wrappers = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    names = {}
    for name, _ in model.named_modules():
        parts = name.split(".")
        inside = [i for i in range(1, len(parts)) if ".".join(parts[:i]) in wrappers]
        if name not in wrappers and all(parts[i] == "base_layer" for i in inside):
            names[name] = ".".join(part for i, part in enumerate(parts) if i not in inside)
    return names


def fused_experts(model: nn.Module) -> list[str]:
    """The last names of MLP projections that are parameters of three dimensions instead of modules, sorted."""
    names = {name for name, parameter in model.named_parameters() if parameter.dim() == 3 and ends_with(name, MLP)}
    return sorted({name.rpartition(".")[2] for name in names})


def resolve_placement(config: BottleneckConfig, model: nn.Module) -> None:
    """Put the names that the placement stands for in this model in its place.

    Raises:
        ValueError: the model lacks a projection that the placement needs.
    """
    placement = config.placement or "paper"
    modules = dict(model.named_modules())
    names = [before for name, before in base_names(model).items() if linear_widths(modules[name])]
    targets, alike = placement_targets(names, config.mode, placement)
    experts = fused_experts(model)
    model_name = type(model).__name__
    if experts and not targets:
        raise ValueError(
            f"The experts of {model_name} are fused into parameters ({', '.join(experts)}), not linear modules, so "
            f"placement={placement!r} finds no MLP: pass target_modules with the attention's projections, such as "
            "['o_proj'], or use peft.LoraConfig(target_parameters=…), which reaches the experts."
        )
    if not targets:
        hint = " (its MLP is no module of its own, so use mode='parallel' alone)" if placement == "he" else ""
        raise ValueError(
            f"The projections for placement={placement!r}, mode={config.mode!r} were not found in {model_name}{hint}: "
            "pass target_modules with the names of its linear modules."
        )
    if experts:
        warnings.warn(
            f"Experts of {model_name} are fused into parameters ({', '.join(experts)}) and get no adapters: only "
            f"the linear modules {', '.join(targets)} do.",
            stacklevel=2,
        )
    config.target_modules, config.placement = targets, None
    if alike:
        config.exclude_modules = joined(config.exclude_modules, alike)


def joined(excluded: list[str] | str | None, ends: list[str]) -> list[str] | str:
    """Names to leave out, as a list of ends or a regular expression as `excluded` is, and the ends of names `ends`."""
    if isinstance(excluded, str):
        return rf"(?:{excluded})|(?:.*\.)?(?:{'|'.join(map(re.escape, ends))})"
    return [*(excluded or ()), *(end for end in ends if end not in (excluded or ()))]


def add_lora_modules(config: BottleneckConfig, model: nn.Module) -> None:
    """Put the modules with LoRA among the targets.

    Raises:
        ValueError: one of them is not in the model.
    """
    names, lora = list(base_names(model).values()), config.lora_modules or []
    if missing := [end for end in lora if not ends_found(names, (end,))]:
        raise ValueError(
            f"lora_modules has {', '.join(map(repr, missing))}, which {type(model).__name__} lacks: pass ends of the "
            "names of its linear modules."
        )
    if isinstance(config.target_modules, str):  # An expression, as `ist.focus` writes it, names them all.
        return
    targets = list(config.target_modules or ())
    config.target_modules = [*targets, *(end for end in lora if not any(ends_with(t, (end,)) for t in targets))]


def refuse_both(config: BottleneckConfig, model: nn.Module) -> None:
    """Raise ValueError where the placement has a module that is to have LoRA: a module carries one of the two."""
    targets, lora = config.target_modules or (), config.lora_modules or ()
    both = [name for name in base_names(model).values() if ends_with(name, targets) and ends_with(name, lora)]
    if both:
        raise ValueError(
            f"{both[0]!r} is to have LoRA and a bottleneck: leave it out of lora_modules, or take another placement."
        )


def refuse_other_adapters(model: nn.Module) -> None:
    """Raise ValueError where a model carries adapters of another kind, which would be frozen and never be saved."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, BottleneckLayer):
            raise ValueError(
                f"The model carries other adapters already ({type(module).__module__.split('.')[-2]}), and PEFT saves "
                "one kind with a model: for LoRA beside bottlenecks, give the base model one "
                "BottleneckConfig(lora_modules=[…])."
            )


class BottleneckModel(BaseTuner):
    """The PEFT tuner behind `BottleneckConfig`; `peft.get_peft_model(model, BottleneckConfig(...))` makes it.

    Raises:
        ValueError: no projection is found where the placement needs one, or a target cannot carry the adapter. The
            model is then as it was before.
    """

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's own annotation)

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        refuse_other_adapters(model)  # before PEFT changes anything
        super().__init__(model, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict[str, Any]) -> BottleneckConfig:  # type: ignore[override]
        """Replace the placement by the names that it stands for in this model, as the saved file will hold them."""
        if peft_config.target_modules is None:
            resolve_placement(peft_config, self.model)
            refuse_both(peft_config, self.model)
        if peft_config.mode == "series" and peft_config.output_modules is None:
            peft_config.output_modules = [*MLP_OUTPUT, *ATTENTION_OUTPUT]
        if peft_config.lora_modules:
            add_lora_modules(peft_config, self.model)
        return peft_config

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:  # type: ignore[override]
        """Check every target before any is replaced."""
        modules = dict(model.named_modules())
        for name in base_names(model).values():
            if not name or not self._check_target_module_exists(peft_config, name):
                continue
            if name not in modules:
                raise ValueError(f"Target {name!r} lies inside a module with an adapter: pass other target_modules.")
            wiring(peft_config, name, modules[name])

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        position, width_in, width_out = wiring(peft_config, current_key, target)
        if ends_with(current_key, peft_config.lora_modules or ()):
            peft_config = peft_config.lora_settings()
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, config=peft_config, position=position)
            return
        layer = BottleneckLayer(
            target,
            adapter_name,
            config=peft_config,
            position=position,
            in_features=width_in,
            out_features=width_out,
        )
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if getattr(child, "base_layer", None) is new_module:
            setattr(parent, child_name, new_module)  # Unloading; PEFT's own asks for a weight, which an MLP has not.
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_REFUSAL)
