"""The sizes that a model's config.json describes, beside what the files of its weights hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

__all__ = ["Held", "check_counts", "check_sizes", "files_hold", "make_counted"]

ENDINGS = (".safetensors", ".bin", ".pt", ".pth")
"""Of files of weights."""
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
"""Of one number, by the types that safetensors has for it; what is packed into others may take 1 bit."""
MOST_HEADER = 100_000_000
"""Bytes of a safetensors header, as safetensors itself has it."""
COUNTS = re.compile(r"(^|_)(layers?|blocks?|depth|groups|labels)$")
"""In names of settings of which a configuration makes lists, before there is a model."""
LEAST_BYTES, MOST_TENSORS = 64, 30_000
"""Bytes of a tensor in a file that has no header, and the tensors that such a file may hold."""
LEAST_PARTS, PARTS_EACH = 30_000, 10
"""Tensors and modules that a model may always have, and for each tensor in its files."""
LEAST_NUMBERS = 2**28
"""Parameters that a model may always have beyond those in its files: 1 GiB in float32."""
LEAST_BUFFERS = 2**34
"""Bytes that the buffers of a model may always have."""
MOST_NUMBERS = 2**44
"""Parameters of a model that no machine holds, where its files are not here."""
WAY_OUT = "give the config.json that belongs to its weights."


@dataclass(frozen=True)
class Held:
    """What the files of a model hold."""

    numbers: int
    """Parameters at most."""
    tensors: int
    """At most."""


def files_hold(source: str, options: Mapping[str, Any], read: Mapping[str, Any]) -> Held | None:
    """What all files of weights in a model's folder hold; None where they are not here.

    Args:
        source: the model's folder or name.
        options: of transformers' `from_pretrained`.
        read: the model's config.json.
    """
    folder = Path(source) / str(options.get("subfolder") or "")
    if not folder.is_dir() or read.get("transformers_weights"):
        return None
    files = [file for file in folder.iterdir() if file.suffix in ENDINGS and file.is_file()]
    found = [header_holds(file) if file.suffix == ".safetensors" else bytes_hold(file) for file in files]
    if not found:
        return None
    return Held(sum(held.numbers for held in found), sum(held.tensors for held in found))


def bytes_hold(file: Path) -> Held:
    """What a file may hold by its size."""
    size = file.stat().st_size
    return Held(8 * size, min(size // LEAST_BYTES, MOST_TENSORS))


def header_holds(file: Path) -> Held:
    """What a file of safetensors holds by its header, and by its size where that is damaged."""
    size, numbers, tensors = file.stat().st_size, 0, 0
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= min(size, MOST_HEADER) else {}
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                numbers += 8 * (end - begin) // BITS.get(tensor["dtype"], 1)
                tensors += 1
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return bytes_hold(file)
    return Held(min(numbers, 8 * size), tensors) if tensors else bytes_hold(file)


def most_parts(held: Held | None) -> int:
    """Tensors and modules that a model may have."""
    return max(LEAST_PARTS, PARTS_EACH * (MOST_TENSORS if held is None else held.tensors))


def check_counts(described: str, settings: Mapping[str, Any], held: Held | None) -> None:
    """Raise ValueError at a number of layers, or of another thing, that no list in memory should have.

    Args:
        described: where the settings come from, in words.
        settings: of the model, at any depth.
        held: what its files hold.
    """
    for name, number in counts_in(settings):
        if number > most_parts(held):
            raise ValueError(f"{described} sets {name} to {number}, and {say_held(held)}: {WAY_OUT}")


def counts_in(settings: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The settings that count layers and the like, the greatest first."""
    found: list[tuple[str, int]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found += counts_in(value)
        elif isinstance(value, int) and COUNTS.search(str(name)):
            found.append((name, value))
    yield from sorted(found, key=lambda pair: -pair[1])


class TooManyError(Exception):
    """A model has more parts than its files may hold."""


def make_counted(
    described: str, settings: Mapping[str, Any], held: Held | None, make: Callable[[], nn.Module]
) -> nn.Module | None:
    """An empty model, whose making ends with ValueError once it has far more parts than its files hold; None where any
    other error ends it, which is left to the loading.

    Args:
        described: where the settings come from, in words.
        settings: of the model, at any depth.
        held: what its files hold.
        make: makes it.
    """
    most, made = most_parts(held), 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise TooManyError

    hooks = (register_module_parameter_registration_hook(count), register_module_module_registration_hook(count))
    try:
        return make()
    except TooManyError:
        first = next((f" ({name}={number})" for name, number in counts_in(settings)), "")
        raise ValueError(
            f"{described} describes a model of more than {most} tensors and modules{first}, and {say_held(held)}: "
            + WAY_OUT
        ) from None
    except Exception:
        return None
    finally:
        for hook in hooks:
            hook.remove()


def check_sizes(described: str, model: nn.Module, held: Held | None) -> None:
    """Raise ValueError where an empty model has far more parameters than its files hold, or endless buffers.

    Args:
        described: where its settings come from, in words.
        model: on PyTorch's meta device.
        held: what its files hold.
    """
    named = dict(model.named_parameters())  # Tied ones once.
    numbers = sum(parameter.numel() for parameter in named.values())
    if numbers > (MOST_NUMBERS if held is None else 2 * held.numbers + LEAST_NUMBERS):
        raise ValueError(
            f"{described} describes a model of {numbers:.3g} parameters ({say_largest(named)}), and {say_held(held)}: "
            + WAY_OUT
        )
    buffers = dict(model.named_buffers())
    size = sum(buffer.nbytes for buffer in buffers.values())
    if size > LEAST_BUFFERS + (0 if held is None else held.numbers):
        raise ValueError(
            f"{described} describes a model with {size:.3g} bytes of buffers ({say_largest(buffers)}), which no "
            f"machine should hold: {WAY_OUT}"
        )


def say_largest(named: Mapping[str, Tensor]) -> str:
    """The name and the shape of the largest tensor."""
    name, largest = max(named.items(), key=lambda pair: pair[1].numel())
    return f"{name} is {' × '.join(map(str, largest.shape))}"


def say_held(held: Held | None) -> str:
    """What the files of a model hold, as the second half of a sentence."""
    if held is None:
        return "no machine holds that"
    return f"the files of its weights hold at most {held.tensors} tensors and {held.numbers:.3g} parameters"
