"""The parts of a step: their order, and that closing reaches every one of them."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from ist import SparseTuner
from ist.runtime.part import Part
from ist.step.parts import close_all
from tests.helpers.tiny import tiny_batches, tiny_lora


class Noting(Part):
    """Writes down what it is told."""

    def __init__(self, name: str, notes: list[str], fails: bool = False) -> None:
        self.name, self.notes, self.fails = name, notes, fails

    def begin(self, active: Collection[int], step: int) -> None:
        self.notes.append(f"{self.name} begin {len(active)} {step}")

    def before_update(self) -> None:
        self.notes.append(f"{self.name} before")

    def after_update(self, step: int) -> None:
        self.notes.append(f"{self.name} after {step}")

    def end(self) -> None:
        self.notes.append(f"{self.name} end")

    def close(self) -> None:
        self.notes.append(f"{self.name} close")
        if self.fails:
            raise RuntimeError("cannot be closed")


def test_a_step_tells_its_parts_in_order() -> None:
    notes: list[str] = []
    with SparseTuner(tiny_lora(), num_active_layers=1, probe_batches=tiny_batches(1)) as tuner:
        tuner._parts._parts = (*tuner._parts._parts, Noting("a", notes), Noting("b", notes))
        tuner.begin_step()
        tuner.before_optimizer_step()
        tuner.after_optimizer_step()
        tuner.end_step()
    assert notes == [
        "a begin 1 0", "b begin 1 0", "a before", "b before", "a after 0", "b after 0", "a end", "b end", "b close",
        "a close",
    ]  # fmt: skip


def test_every_part_is_closed_also_where_one_fails() -> None:
    notes: list[str] = []
    parts = [Noting("a", notes), Noting("b", notes, fails=True), Noting("c", notes)]
    with pytest.raises(RuntimeError, match="cannot be closed"):
        close_all(parts)
    assert notes == ["c close", "b close", "a close"]
