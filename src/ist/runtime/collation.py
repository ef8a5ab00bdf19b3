"""Collators, samplers and datasets that hold generators of their own, which measuring must not advance."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

__all__ = ["private_state", "readers_of", "reading"]

MANY = 100
"""Containers of more items hold data, and are not searched."""

NOT_SEARCHED = (type, ModuleType, nn.Module, Tensor, Dataset)
"""What a collator or a sampler may hold but does not consist of."""


@contextmanager
def private_state(collate: Any, seed: int, readers: tuple[Any, ...] = ()) -> Iterator[None]:
    """Within the context the own generators of what makes batches are seeded with `seed`; afterwards it is as it was.

    Nothing is copied: a collator may hold a model. Put back are torch's, NumPy's and Python's generators, and what else
    changed in the attributes, lists and dictionaries of the collator; a function's closure and the object of a
    method are among them. What module globals hold is not found.

    Args:
        collate: makes a batch of a list of examples; None is nothing to look after.
        seed: of 63 bits; each generator gets one of its own from it.
        readers: samplers and methods of datasets, of which generators alone are put back: a dataset keeps the files
            that it has opened.
    """
    parts = list(consists_of(collate))
    held = [holder for part in parts for holder in holders(part)]
    before = [list(holder) if isinstance(holder, list) else dict(holder) for holder in held]
    undo: list[Callable[[], object]] = []
    try:
        for part in {id(part): part for part in (*parts, *consists_of(readers))}.values():
            put_generator_back = reseed(part, (seed + len(undo)) % 2**63)
            if put_generator_back:
                undo.append(put_generator_back)
        yield
    finally:
        for put_generator_back in undo:
            put_generator_back()
        for holder, items in zip(held, before, strict=True):
            put_back(holder, items)


def readers_of(loader: Any) -> tuple[Any, ...]:
    """What of a loader, beside its collator, may hold generators; its workers have copies, which do not count."""
    names = ("generator", "sampler", "batch_sampler")
    return (*(getattr(loader, name, None) for name in names), reading(getattr(loader, "dataset", None)))


def reading(dataset: Any) -> Any:
    """The method by which a dataset of PyTorch's kind is read; those of other libraries have no generators."""
    return getattr(dataset, "__getitem__", None) if isinstance(dataset, Dataset) else None


def consists_of(root: Any) -> Iterator[Any]:
    """An object and all that it consists of, each once."""
    seen: dict[int, Any] = {}
    waiting = [root]
    while waiting:
        part = waiting.pop()
        if id(part) not in seen:
            seen[id(part)] = part
            waiting += direct_parts(part)
            yield part


def direct_parts(item: Any) -> list[Any]:
    """What an object consists of at first sight."""
    if isinstance(item, MethodType):
        return [item.__self__, item.__func__]
    parts: list[Any] = []
    if isinstance(item, FunctionType):
        parts += item.__defaults__ or ()
        parts += (item.__kwdefaults__ or {}).values()
        parts += (cell.cell_contents for cell in item.__closure__ or () if has_contents(cell))
    elif isinstance(item, partial):
        parts += (item.func, *item.args, *item.keywords.values())
    elif isinstance(item, (tuple, set, frozenset)) and len(item) <= MANY:
        parts += item
    for holder in holders(item):
        parts += holder.values() if isinstance(holder, dict) else holder
    return [part for part in parts if not isinstance(part, NOT_SEARCHED)]


def has_contents(cell: Any) -> bool:
    """Whether a variable of a closure has a value yet."""
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def holders(item: Any) -> list[Any]:
    """The dictionaries and lists in which an object keeps what can change."""
    attributes = getattr(item, "__dict__", None)
    found: list[Any] = [attributes] if isinstance(attributes, dict) else []
    if isinstance(item, (dict, list)) and len(item) <= MANY:
        found.append(item)
    return found


def put_back(holder: Any, before: Any) -> None:
    """Have a dictionary or a list hold what it held."""
    if isinstance(holder, list):
        if len(holder) != len(before) or any(map(lambda now, then: now is not then, holder, before)):
            holder[:] = before
        return
    for name in [name for name in holder if name not in before]:
        del holder[name]
    for name, value in before.items():
        if name not in holder or holder[name] is not value:
            holder[name] = value


def reseed(item: Any, seed: int) -> Callable[[], object] | None:
    """Seed a generator; returns what puts it back as it was, or None for anything else."""
    if isinstance(item, torch.Generator):
        undo = partial(item.set_state, item.get_state())
        item.manual_seed(seed)
        return undo
    if isinstance(item, random.SystemRandom):  # It has no state.
        return None
    if isinstance(item, random.Random):
        undo = partial(item.setstate, item.getstate())
        item.seed(seed)
        return undo
    numpy_random: Any = sys.modules.get("numpy.random")
    if numpy_random is None:
        return None
    if isinstance(item, numpy_random.RandomState):
        undo = partial(item.set_state, item.get_state())
        item.seed(seed % 2**32)
        return undo
    generator = item.bit_generator if isinstance(item, numpy_random.Generator) else item
    if isinstance(generator, numpy_random.BitGenerator):
        undo = partial(setattr, generator, "state", generator.state)
        generator.state = type(generator)(seed).state
        return undo
    return None
