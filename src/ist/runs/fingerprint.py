"""Tell whether the frozen weights under an adapter are those that it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..runtime.sharding import is_sharded

__all__ = ["base_fingerprint", "weights_fingerprint"]

SAMPLES = 64
"""Elements of each tensor that count."""


def base_fingerprint(model: nn.Module) -> str | None:
    """A digest of the frozen weights: of names, shapes and evenly spaced elements of each tensor.

    Elements are rounded to bfloat16, so that the same weights have the same digest in float32 and bfloat16, and on
    every device. Quantised weights count by name and shape alone.

    Args:
        model: with adapters, whose trainable parameters do not count, nor what they replace.

    Returns:
        16 hexadecimal digits; None where each rank holds but a part of the weights (FSDP), or they are on no device.
    """
    if is_sharded(model) or any(parameter.is_meta for parameter in model.parameters()):
        return None
    unused = set(map(id, unused_parameters(model)))
    return weights_fingerprint(
        (name, p) for name, p in model.named_parameters() if not p.requires_grad and id(p) not in unused
    )


def unused_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The originals of modules that train as copies (`modules_to_save`): of a new head they are random in each process,
    and the copy, which is used and saved, is what counts.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield from module.original_module.parameters()


@torch.no_grad()
def weights_fingerprint(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """The digest of some parameters, given with their names, as `base_fingerprint` makes it."""
    digest = hashlib.blake2b(digest_size=8)
    samples = []
    for name, parameter in parameters:
        digest.update(f"{name}{list(parameter.shape)}".encode())
        if parameter.is_floating_point() and parameter.numel():
            flat = parameter.detach().reshape(-1)
            samples.append(flat[:: max(1, flat.numel() // SAMPLES)].to(torch.bfloat16))
    if samples:
        # One copy to the CPU rather than hundreds, wherever the weights are.
        values = torch.cat([sample.to(samples[0].device) for sample in samples])
        digest.update(str(values.float().cpu().tolist()).encode())
    return digest.hexdigest()
