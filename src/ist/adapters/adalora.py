"""AdaLoRA under sparse tuning: its rank allocation continues while layers are frozen, its own loss is no reward.

AdaLoRA (Zhang et al., 2023) writes an adapter as `P·diag(λ)·Q`, measures while training how much the loss would feel
each singular value (the running average of `|w·∂L/∂w|` and of its spread), and step by step switches the least felt
ones off until a budget is met. It adds `‖PᵀP − 1‖ + ‖QQᵀ − 1‖` of all layers to the loss. Three things need care:

- a frozen layer has no gradient, so its averages stay as they are: it was not measured in this step;
- the orthogonality term is made from the weights, past the adapters' forward: it would give frozen layers a gradient;
- the term says nothing of the batch: it is left out where candidate sets are measured.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from ..runtime.part import Part

if TYPE_CHECKING:
    from peft import AdaLoraConfig, AdaLoraModel

__all__ = ["RankAllocation", "find_adalora", "without_orthogonality_loss"]


def find_adalora(model: nn.Module) -> AdaLoraModel | None:
    """The AdaLoRA tuner of a model that has one with an adapter in training, else None."""
    from peft import AdaLoraModel

    tuner = getattr(model, "base_model", None)
    return tuner if isinstance(tuner, AdaLoraModel) and hasattr(tuner, "rankallocator") else None


@contextmanager
def without_orthogonality_loss(model: nn.Module) -> Iterator[None]:
    """Within the context, AdaLoRA's orthogonality term is not added to the loss of `model`; others are as they are."""
    tuner = find_adalora(model)
    if tuner is None:
        yield
        return
    before = vars(tuner).get("forward")
    # The tuner's forward is that of the model it wraps, plus the term.
    vars(tuner)["forward"] = tuner.model.forward
    try:
        yield
    finally:
        if before is None:
            del vars(tuner)["forward"]
        else:
            vars(tuner)["forward"] = before


class RankAllocation(Part):
    """Runs AdaLoRA's rank allocation once a step, over layers some of which are frozen.

    PEFT leaves the call of `update_and_allocate` to the training loop, and its own code fails on a parameter without a
    gradient. While this object is open, `update_and_allocate` works with frozen layers, whoever calls it, and a second
    call for the same step does nothing.

    With a pattern of ranks in its configuration PEFT saves only those that are left, into which no optimizer state and
    no earlier checkpoint fits. The pattern is therefore kept here, and what is saved holds all ranks, the switched-off
    ones as zeros, which computes the same.

    Args:
        tuner: PEFT's AdaLoRA tuner; it is as before after `close`.
    """

    def __init__(self, tuner: AdaLoraModel) -> None:
        self.done = False
        """Whether ranks were allocated since the step began."""
        self._tuner = tuner
        self._warned = False
        self._last_step: int | None = None
        self._pattern: dict[str, list[bool]] | None = None
        tuner.update_and_allocate = self._allocate
        tuner.rankallocator.update_ipt = self._update_sensitivities

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole schedule."""
        return cast("int", self._config.total_step)

    @property
    def _last_allocation(self) -> int:
        """The step at which the ranks are settled."""
        return self.total_steps - cast("int", self._config.tfinal)

    @property
    def _config(self) -> AdaLoraConfig:
        return cast("AdaLoraConfig", self._tuner.peft_config[self._tuner.trainable_adapter_name])

    def check_length(self, num_steps: int) -> None:
        """Warn where the training ends before the budget is reached."""
        if self.total_steps > num_steps:
            warnings.warn(
                f"AdaLoRA's schedule is of {self.total_steps} steps and this training of {num_steps}, so its budget is "
                f"not reached: set total_step={num_steps} in AdaLoraConfig.",
                stacklevel=5,
            )

    def begin(self, active: Collection[int], step: int) -> None:
        """Expect one allocation from now on."""
        self.done = False
        if step > self._last_allocation and self._pattern is None:  # Resumed after the ranks were settled.
            self._pattern = ranks_left(self._tuner)

    def after_update(self, step: int) -> None:
        """Allocate, unless the training loop has done so since the step began.

        To be called after the optimizer's step, while the gradients are there.

        Args:
            step: optimizer steps done before this one.
        """
        if not self.done:
            self._allocate(step)

    def end(self) -> None:
        """Say once that nothing was allocated."""
        if not self.done and not self._warned:
            self._warned = True
            warnings.warn(
                "AdaLoRA's ranks are not being allocated: call tuner.after_optimizer_step() after optimizer.step() and "
                "before optimizer.zero_grad().",
                stacklevel=5,
            )

    def give_up(self) -> None:
        """Nothing had to be allocated."""

    def close(self) -> None:
        """Leave the tuner as PEFT made it."""
        for owner, name in ((self._tuner, "update_and_allocate"), (self._tuner.rankallocator, "update_ipt")):
            if getattr(vars(owner).get(name), "__self__", None) is self:
                del vars(owner)[name]

    def _allocate(self, global_step: int) -> None:
        """`AdaLoraModel.update_and_allocate`, once for each step."""
        self.done = True
        if global_step != self._last_step:
            self._last_step = global_step
            if global_step == self._last_allocation and not self._tuner.rankallocator.ipt:  # Resumed just here.
                self._update_sensitivities(self._tuner.model)
            self._config.rank_pattern = self._pattern
            type(self._tuner).update_and_allocate(self._tuner, global_step)
            self._pattern, self._config.rank_pattern = self._config.rank_pattern, None

    def _update_sensitivities(self, model: nn.Module) -> None:
        """`RankAllocator.update_ipt` for the parameters that have a gradient; nothing where one is not finite.

        Such gradients come with a step that fp16's scaler skips, and would stay in the averages for ever.

        A layer that was never active starts from 0, which is what the loss feels of it: its singular values are 0, and
        with them every `w·∂L/∂w`.
        """
        allocator = self._tuner.rankallocator
        if gradients_are_finite(model):
            type(allocator).update_ipt(allocator, WithGradient(model))
        for name, parameter in model.named_parameters():
            if "lora_" in name and allocator.adapter_name in name and name not in allocator.ipt:
                for averages in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
                    averages[name] = torch.zeros_like(parameter)


def gradients_are_finite(model: nn.Module) -> bool:
    """Whether all gradients of a model are finite; waits for the device once."""
    finite = [p.grad.isfinite().all() for p in model.parameters() if p.grad is not None]
    return bool(torch.stack([flag.to(finite[0].device) for flag in finite]).all()) if finite else True


def ranks_left(tuner: AdaLoraModel) -> dict[str, list[bool]]:
    """The pattern of ranks as PEFT writes it, from the singular values that are not 0."""
    mark = f"lora_E.{tuner.trainable_adapter_name}"
    parameters = tuner.model.named_parameters()
    return {name: (values != 0).view(-1).tolist() for name, values in parameters if mark in name}


class WithGradient:
    """A model as seen through `named_parameters`, without those that have no gradient."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that have a gradient."""
        return ((name, parameter) for name, parameter in self._model.named_parameters() if parameter.grad is not None)
