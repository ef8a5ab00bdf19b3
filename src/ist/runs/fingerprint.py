"""Tell whether the frozen weights under an adapter, and the data, are those that it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..runtime.collation import private_state
from ..runtime.randomness import private_randomness
from ..runtime.sharding import is_sharded

__all__ = ["base_fingerprint", "data_fingerprint", "weights_fingerprint"]

SAMPLES = 64
"""Elements of each tensor that count."""

SAMPLED_ROWS = 32
"""Rows of the training data that count, beside their number."""


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


def data_fingerprint(dataset: Any) -> str | None:
    """The number of rows and a digest of evenly spaced ones, the first and the last among them.

    The rows are read as training reads them, with the same random augmentation each time and none of the training's
    random numbers spent.

    Args:
        dataset: with a length, and a row for each index.

    Returns:
        Such as `"960 rows, 1b4e28ba2fa1ee15"`; None for data that can only be iterated or that cannot be read here.
    """
    if isinstance(dataset, IterableDataset):
        return None
    try:
        count = len(dataset)
        chosen = sorted({number * (count - 1) // max(1, SAMPLED_ROWS - 1) for number in range(SAMPLED_ROWS)})
        digest = hashlib.blake2b(digest_size=8)
        with private_randomness(0), private_state(dataset, 0):
            for index in chosen if count else ():
                for part in canonical(dataset[index]):
                    digest.update(part)
    except Exception:
        return None  # The training itself says what is wrong with its data, if it is.
    return f"{count} rows, {digest.hexdigest()}"


def canonical(value: Any) -> Iterator[bytes]:
    """A row as bytes that two equal rows share in every process: values, shapes and names, no addresses.

    Raises:
        TypeError: it holds something of another kind.
    """
    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            yield f"{name}:".encode()
            yield from canonical(value[name])
    elif isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        yield f"{flat.dtype}{list(flat.shape)}".encode()
        yield flat.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif hasattr(value, "tobytes"):  # NumPy's arrays and numbers, and pictures
        yield f"{type(value).__name__}{getattr(value, 'shape', getattr(value, 'size', ''))}".encode()
        yield value.tobytes()
    elif isinstance(value, (list, tuple)):
        yield f"[{len(value)}".encode()
        for item in value:
            yield from canonical(item)
    elif value is None or isinstance(value, (str, bytes, int, float)):
        yield repr(value).encode("utf-8", "backslashreplace")
    else:
        raise TypeError(f"{type(value).__name__} has no bytes to compare.")
