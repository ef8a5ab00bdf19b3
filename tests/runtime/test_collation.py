"""A collator's own state: seeded while a probe batch is made, and afterwards as it was."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ist.runtime.collation import private_state

Draw = Callable[[], Any]


class Holder:
    """A collator with a generator, and with the things that cannot be copied."""

    def __init__(self, draw: Draw) -> None:
        self.nested = {"parts": [(draw,)]}
        self.lock = threading.Lock()
        self.weights = torch.ones(3, requires_grad=True) * 2

    def __call__(self) -> Any:
        return self.nested["parts"][0][0]()


class Owner(nn.Module):
    """A model that also collates."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw
        self.linear = nn.Linear(2, 2)

    def collate(self) -> Any:
        return self.draw()


def closure(draw: Draw) -> Draw:
    def collate() -> Any:
        return draw() if calls else late

    calls = 1
    if not calls:
        late = 0  # The closure holds a variable without a value.
    return collate


def by_default(draw: Draw) -> Draw:
    def collate(*, given: Draw = draw) -> Any:
        return given()

    return collate


PLACES: dict[str, Callable[[Draw], Draw]] = {
    "object": Holder,
    "method": lambda draw: Owner(draw).collate,
    "closure": closure,
    "default": by_default,
    "partial": lambda draw: functools.partial(lambda given: given(), draw),
}


def torch_draw() -> Draw:
    generator = torch.Generator().manual_seed(5)
    return lambda: torch.rand(2, generator=generator).tolist()


GENERATORS: dict[str, Callable[[], Draw]] = {
    "torch": torch_draw,
    "random": lambda: random.Random(5).random,
    "numpy": lambda: functools.partial(np.random.default_rng(5).random),
    "old numpy": lambda: functools.partial(np.random.RandomState(5).rand),
    "bits": lambda: functools.partial(np.random.MT19937(5).random_raw),
}


def owner_of(draw: Draw) -> Draw:
    """Built-in methods hide whose they are: a function of one's own holds the generator itself."""
    inner = getattr(draw, "func", draw)
    owner = getattr(inner, "__self__", None)
    name = getattr(inner, "__name__", "")
    return draw if owner is None else lambda: getattr(owner, name)()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("generator", GENERATORS)
def test_the_seed_decides_inside_and_outside_nothing_has_happened(place: str, generator: str) -> None:
    collate, twin = (PLACES[place](owner_of(GENERATORS[generator]())) for _ in range(2))
    with private_state(collate, 11):
        first = [collate(), collate()]
    assert first[0] != first[1]
    with private_state(collate, 11):
        assert [collate(), collate()] == first
    with private_state(collate, 12):
        assert collate() != first[0]
    assert [collate() for _ in range(3)] == [twin() for _ in range(3)]


def test_two_generators_draw_different_numbers() -> None:
    first, second = torch_draw(), torch_draw()
    with private_state(lambda: (first(), second()), 2**63 - 1):
        assert first() != second()


def test_what_changed_is_put_back_also_after_an_exception() -> None:
    class Packing:
        def __init__(self) -> None:
            self.calls = 0
            self.rest: list[int] = [1]
            self.seen = {"a": 1}

    collator, rest = Packing(), [1]
    collator.rest = rest

    def collate() -> None:
        collator.calls += 1
        collator.rest.append(2)
        collator.seen["b"] = 2
        collator.seen.pop("a")
        collator.late = torch.Generator()  # type: ignore[attr-defined]  # as transformers' collator makes its own
        raise RuntimeError("as planned")

    with pytest.raises(RuntimeError, match="as planned"), private_state(collate, 0):
        collate()
    assert vars(collator) == {"calls": 0, "rest": [1], "seen": {"a": 1}}
    assert collator.rest is rest


@pytest.mark.parametrize(
    "collate", [None, len, random.SystemRandom(), print], ids=["nothing", "len", "system random", "print"]
)
def test_what_holds_nothing_is_left_alone(collate: Any) -> None:
    with private_state(collate, 0):
        pass
