"""Which of PEFT's LoRA modules are fused, and how they are switched over and back.

A module that is taken keeps its class, its parameters and its place; only its own `forward` goes before that of its
class, and hands every call that it cannot take (adapters off, merged, several at once, …) to PEFT's.
"""

from __future__ import annotations

from collections.abc import Collection
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...runtime.sharding import inner_units
from .few import few_rows_linear, has_few_rows
from .frozen import KeptPair, PairKeeper, frozen_lora_linear
from .function import lora_linear, lora_update

__all__ = ["FusedLora", "JoinError", "RowFactors", "Switch", "reason_against", "remove_fused"]

NAMES = (
    "forward",
    "_ist_switch",
    "_ist_frozen",
    "_ist_names",
    "_ist_dropout",
    "_ist_pair",
    "_ist_norms",
    "_ist_factors",
)
"""What a module that was taken over has of its own."""


class JoinError(RuntimeError):
    """A module that is to scale its response row by row computes in a way that has no rows."""


class RowFactors(NamedTuple):
    """Factors on the responses of equal parts of a batch, one part after the other."""

    values: Tensor
    """`[parts, 1, 1]`."""
    shape: tuple[int, int]
    """Rows and tokens of the whole batch: what has another shape has its rows elsewhere."""


class Switch:
    """Whether the modules that share it are frozen: that their adapters are frozen. Those of a copied model are not."""

    def __init__(self) -> None:
        self.frozen = False
        self.pairs: dict[object, KeptPair] = {}
        """What was prepared of frozen matrices. They may be written to at any time between steps, by ways that nothing
        tells of: cleared at each beginning of a step.
        """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class FusedLora:
    """One fused LoRA module, until `remove`.

    Args:
        module: a module for which `reason_against` has no reason.
        frozen: a context to compute a frozen module in where its parts run by themselves.
        keep_dropout: whether frozen modules drop their adapter's input out too, as PEFT does for frozen adapters.
        keep_pair: whether matrices are prepared for products once a step while the module is frozen. Not where an
            engine brings them at each forward anew.
        switch: says whether the module is frozen; one of its own if None.
        names: the adapters that train with the module's layer; PEFT's own forward runs with any other one. All if None.
        norms: whether an input that Liger's RMSNorm returned is made again in the backward instead of kept.
    """

    def __init__(
        self,
        module: Any,
        frozen: Any,
        keep_dropout: bool = False,
        keep_pair: bool = True,
        switch: Switch | None = None,
        names: Collection[str] | None = None,
        norms: bool = False,
    ) -> None:
        self.module = module
        self.switch = switch or Switch()
        pair = PairKeeper(keep_pair, self.switch.pairs)
        module.__dict__.update(
            forward=MethodType(fused_forward, module),
            _ist_switch=self.switch,
            _ist_frozen=frozen,
            _ist_names=frozenset(module.lora_A if names is None else names),
            _ist_dropout=keep_dropout,
            _ist_pair=pair,
            _ist_norms=norms,
            _ist_factors=None,
        )

    def reason_against(self) -> str | None:
        """Why the module computes as PEFT has it by now, where its parts were changed or hooked since; None if not."""
        return reason_against_parts(self.module)

    @staticmethod
    def set_factors(module: nn.Module, factors: RowFactors | None) -> None:
        """Scale the response of a frozen module row by row; None is by nothing.

        Raises:
            JoinError: the module was not taken over.
        """
        if "_ist_factors" not in module.__dict__:
            raise JoinError("an adapter computes as PEFT has it")
        module.__dict__["_ist_factors"] = factors

    def remove(self) -> None:
        """Leave the module as PEFT made it, unless another one has taken it over since."""
        if self.module.__dict__.get("_ist_switch") is self.switch:
            remove_fused(self.module)


def remove_fused(module: nn.Module) -> None:
    """Leave a module as PEFT made it, also one of a training that ended with an exception."""
    if "_ist_switch" in module.__dict__:
        for name in NAMES:
            module.__dict__.pop(name, None)


def fused_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a LoRA module that was taken over; `self` is the module."""
    frozen = self._ist_switch.frozen
    names = self._active_adapter
    name = names if isinstance(names, str) else names[0] if len(names) == 1 else None
    if args or kwargs or self._disable_adapters or self.merged_adapters or name not in self._ist_names:
        return peft_forward(self, frozen, x, *args, **kwargs)
    if name in self.lora_variant or not self.cast_input_dtype_enabled or x.dim() < 2:
        return peft_forward(self, frozen, x)
    scaling = self.scaling[name]
    if isinstance(scaling, Tensor):  # A factor that may have a gradient, as a gate does.
        return peft_forward(self, frozen, x)
    children = self._modules  # Looked up here, once: a module's own search for its attributes is slow.
    drop = children["lora_dropout"]._modules[name]
    down, up = children["lora_A"]._modules[name], children["lora_B"]._modules[name]
    if not (is_plain_matrix(down) and is_plain_matrix(up) and is_plain_dropout(drop)):
        return peft_forward(self, frozen, x)
    drops = drop.training and type(drop) is nn.Dropout and (self._ist_dropout or not frozen)
    dropout = drop.p if drops else 0.0
    a, b, c = held(down, "weight"), held(up, "weight"), held(up, "bias")
    if frozen and c is not None:
        c = c.detach()
    base, factors = children["base_layer"], self._ist_factors
    if not is_plain(base):
        check_no_factors(factors)
        y = frozen_base(self, base, x) if frozen else base(x)
        if frozen:
            a, b = a.detach(), b.detach()
        return lora_update(y, x, a, b, c, scaling, dropout, self._ist_norms)
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    weight = weight if isinstance(base, nn.Linear) else weight.t()
    pair = self._ist_pair(x, a, b) if frozen and not dropout else None
    if pair is None or x.dim() < 3:  # Tokens of several rows may be mixed up in two dimensions, as those of experts.
        check_no_factors(factors)
    if pair is not None:
        values = None if factors is None else values_for(factors, x)
        return frozen_lora_linear(x, weight, bias, pair, c, scaling, values)
    if frozen:
        a, b = a.detach(), b.detach()
    if not dropout and has_few_rows(x, weight, a, b):
        return few_rows_linear(x, weight, bias, a, b, c, scaling, self._ist_norms)
    return lora_linear(x, weight, bias, a, b, c, scaling, dropout, self._ist_norms)


def held(module: Any, name: str) -> Any:
    """A module's weight; where reentrant checkpointing recomputes under FSDP1, it is no parameter but an attribute."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


fused_forward.__name__ = "forward"  # By which a pickled module finds the forward of its class.


def peft_forward(module: Any, frozen: bool, *args: Any, **kwargs: Any) -> Tensor:
    """PEFT's own forward, with the adapters frozen where the module is frozen."""
    check_no_factors(module._ist_factors)
    if not frozen:
        return type(module).forward(module, *args, **kwargs)
    with module._ist_frozen:
        return type(module).forward(module, *args, **kwargs)


def frozen_base(module: Any, base: nn.Module, x: Tensor) -> Tensor:
    """The base of a frozen module, without what trains in it with the layer, such as PEFT's `bias="lora_only"`."""
    if not any(weight is not None and weight.requires_grad for weight in base._parameters.values()):
        return base(x)
    with module._ist_frozen:
        return base(x)


def check_no_factors(factors: RowFactors | None) -> None:
    """Raise JoinError where a response was to be scaled row by row."""
    if factors is not None:
        raise JoinError("a module has no rows to scale its response in")


def values_for(factors: RowFactors, x: Tensor) -> Tensor:
    """The factors, if x has its rows where they are meant for, else JoinError."""
    if x.shape[:2] != factors.shape:
        raise JoinError(f"a module has {tuple(x.shape[:2])} rows and tokens in the place of {factors.shape}")
    return factors.values


def is_plain(base: nn.Module) -> bool:
    """Whether a module computes `x Wᵀ + b` with frozen weights and nothing else."""
    if not (type(base) is nn.Linear or type(base).__name__ == "Conv1D"):
        return False
    if "forward" in base.__dict__ or has_hooks(base):
        return False
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.requires_grad or not weight.is_floating_point():
        return False
    return bias is None or not bias.requires_grad


def is_plain_matrix(part: Any) -> bool:
    """Whether one of an adapter's modules is a linear one whose weight can be read instead of calling it."""
    return type(part) is nn.Linear and "forward" not in part.__dict__ and not has_hooks(part)


def is_plain_dropout(part: Any) -> bool:
    """Whether an adapter's dropout is one whose probability can be read instead of calling it."""
    return (type(part) is nn.Identity or (type(part) is nn.Dropout and part.p < 1.0)) and not has_hooks(part)


def has_hooks(module: nn.Module) -> bool:
    """Whether something watches or changes a call of the module."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def reason_against(module: nn.Module, own: Collection[int]) -> str | None:
    """Why a module cannot be fused; None if it can.

    Args:
        module: with adapters.
        own: ids of the parameters that train with the module's layer.
    """
    from peft.tuners import lora

    kinds = [lora.Linear, getattr(lora, "Linear4bit", None), getattr(lora, "Linear8bitLt", None)]
    if type(module) not in kinds:
        return f"{type(module).__module__.split('.')[-2]}.{type(module).__name__}"
    assert isinstance(module, lora.LoraLayer)
    if module.lora_variant:
        return "a variant of LoRA (such as DoRA)"
    if hasattr(module.base_layer, "base_layer"):
        return "another adapter inside"
    if inner_units(module):
        return "FSDP gathers its matrices apart"
    if "forward" in module.__dict__:
        return "a forward of its own"
    for part in (*module.lora_A.values(), *module.lora_B.values()):
        if any(parameter.requires_grad and id(parameter) not in own for parameter in part.parameters()):
            return "matrices that several layers share"
    return reason_against_parts(module)


def reason_against_parts(module: Any) -> str | None:
    """Why the parts of a LoRA module cannot be read instead of called; None if they can."""
    parts = (*module.lora_A.values(), *module.lora_B.values(), *module.lora_dropout.values())
    if any(map(has_hooks, parts)):
        return "hooks on the adapter's own modules"
    if not all(map(is_plain_matrix, (*module.lora_A.values(), *module.lora_B.values()))):
        return "adapter matrices that are no plain linear modules"
    if not all(map(is_plain_dropout, module.lora_dropout.values())):
        return "a dropout of another kind"
    return None
