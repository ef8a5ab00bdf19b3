"""Gradients of a model that computes in float16: its loss is multiplied before the backward, its gradients divided.

Float16 has no number between 0 and 6e-8, and none above 65504. Gradients of a mean over thousands of tokens often lie
below, so they are taken of the loss times a power of two, as a GradScaler does in training. A power of two changes no
digit of what neither falls below nor rises above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.distributed import current_ranks
from ..runtime.sharding import compute_device, is_sharded

__all__ = ["GradientSums", "LossScale"]

FIRST = 2.0**16
"""The scale that is tried first, as by a GradScaler."""


class LossScale:
    """The power of two that a loss is multiplied by, for a model that computes in float16; for any other it is 1.

    It computes in float16 where a tensor of its state or the `compute_dtype` of a quantised module says so, where
    autocast is on with it, or where a module is seen to give it, as under an autocast of the model's own forward.

    Args:
        model: whose gradients are measured.
    """

    def __init__(self, model: nn.Module) -> None:
        self.value, self.used = 1.0, False
        """The scale now; and whether one is used, so that gradients may be infinite because of it."""
        self._sharded = is_sharded(model)
        kind = compute_device(model).type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        held = (tensor.dtype for tensor in (*model.parameters(), *model.buffers()))
        computed = (getattr(module, "compute_dtype", None) for module in model.modules())
        if autocast or torch.float16 in held or torch.float16 in computed:
            self._use()

    def see(self, output: Any) -> None:
        """Get to know what a module gives in the forward: a tensor, alone or first, as attention's."""
        first = output[0] if isinstance(output, tuple) and output else output
        if not self.used and isinstance(first, Tensor) and first.dtype == torch.float16:
            self._use()

    @contextmanager
    def seeing(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Within the context it gets to know what these modules give, and those in them: PEFT may cast results back."""
        with ExitStack() as hooks:
            for part in {part for module in modules for part in module.modules()}:
                hooks.callback(part.register_forward_hook(lambda module, args, output: self.see(output)).remove)
            yield

    def backward(self, loss: Tensor, number: int, are_finite: Callable[[], bool]) -> bool:
        """The backward of a batch. Where the scale was too large for it, the scale is halved.

        Args:
            loss: a scalar. Where it is not finite, its gradients need not be.
            number: of the batch, for messages.
            are_finite: whether the gradients are finite, once they are there.

        Returns:
            Whether the gradients are right; otherwise compute the batch again.

        Raises:
            ValueError: they are infinite or NaN at every scale.
        """
        if not self.used:
            loss.backward()
            return True
        (loss * self.value).backward()
        return self._fits(number, not math.isfinite(loss.item()) or are_finite())

    def gradients(self, loss: Tensor, number: int, weights: Sequence[Tensor]) -> list[Tensor] | None:
        """The gradients of a batch by weights, zeros where there is none, in float32 where a scale is used.

        Returns:
            None where the scale was too large: compute the batch again, as after `backward`.
        """
        if not self.used:
            return list(torch.autograd.grad(loss, weights, materialize_grads=True))
        found = torch.autograd.grad(loss * self.value, weights, materialize_grads=True)
        scale, finite = self.value, all(bool(gradient.isfinite().all()) for gradient in found)
        if not self._fits(number, not math.isfinite(loss.item()) or finite):
            return None
        return [gradient.float() / scale for gradient in found]

    def _fits(self, number: int, finite: bool) -> bool:
        """Whether the gradients of a batch are finite; where they are not, the scale is halved."""
        if self._sharded:  # A forward is one of all ranks.
            finite = current_ranks().all(finite)
        if finite:
            return True
        if self.value == 1:
            raise ValueError(
                f"The gradient of probe batch {number} is infinite or NaN in float16, so nothing can be measured: load "
                "the model in bfloat16 or float32, return a smaller loss, or give other batches."
            )
        self.value /= 2
        return False

    def _use(self) -> None:
        self.value, self.used = FIRST, True


class GradientSums:
    """Sums over tokens and batches of products with gradients, by module, in float32.

    Those of a batch count once all of them are finite.

    Args:
        scale: of the loss.
    """

    def __init__(self, scale: LossScale) -> None:
        self.scale = scale
        self._sums: dict[str, Tensor] = {}
        self._batch: dict[str, Tensor] = {}

    def add(self, name: str, product: Tensor) -> None:
        """Add a product of a module, which may be changed afterwards."""
        add_to(self._batch if self.scale.used else self._sums, name, product)

    def backward(self, loss: Tensor, number: int) -> bool:
        """The backward of a batch, in which `add` is called; see `LossScale.backward`."""
        self._batch.clear()
        if not self.scale.backward(loss, number, self._are_finite):
            return False
        for name, product in self._batch.items():
            add_to(self._sums, name, product)
        self._batch.clear()
        return True

    def take(self) -> dict[str, Tensor]:
        """The sums of the modules that a gradient has reached; begin anew."""
        sums, self._sums = self._sums, {}
        return sums

    def _are_finite(self) -> bool:
        return all(bool(product.isfinite().all()) for product in self._batch.values())


def add_to(sums: dict[str, Tensor], name: str, product: Tensor) -> None:
    """Add to the sum of a name, in place, or begin it."""
    sums[name] = sums[name].add_(product) if name in sums else product
