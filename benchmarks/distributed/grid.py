"""What is measured: a cell is one training in so many processes, and a plan is a list of cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ENGINES", "METHODS", "Cell", "plan"]

METHODS = {"lora": "LoRA", "sampled": "sampled (IST)", "focused": "focused (half)"}
"""LoRA on all layers in PEFT's step; IST; adapters of rank 64 in every second layer in the fused step."""
ENGINES = {"none": "–", "ddp": "DDP", "fsdp2": "FSDP2"}
"""Distributed backends; `none` is for one process."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training."""

    size: str
    """Shape of the model, a key of `harness.SHAPES`."""
    processes: int
    """One for each GPU."""
    engine: str
    method: str
    rows: int
    """Rows of a batch, of each process."""
    tokens: int
    """Tokens of a row."""
    late: float = 0.0
    """Seconds by which the last rank's probe data are late in each measurement."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells cells apart."""
        return tuple(asdict(self).values())

    @property
    def name(self) -> str:
        """For people."""
        late = f", one rank {self.late:g} s late" if self.late else ""
        return (
            f"{self.size}, {self.processes} × {self.engine}, {self.method}, {self.rows} × {self.tokens} tokens a "
            f"process{late}"
        )


def plan(
    sizes: Sequence[str],
    processes: Sequence[int],
    engines: Sequence[str],
    methods: Sequence[str],
    rows: int,
    total_rows: int,
    tokens: int,
    late: float = 0.0,
) -> list[Cell]:
    """Every cell once, small numbers of processes first.

    Args:
        sizes: of models.
        processes: numbers of them.
        engines: for more than one process.
        methods: keys of `METHODS`.
        rows: of each process, whatever their number (weak scaling).
        total_rows: of all processes together (strong scaling); numbers that do not divide it have no such cell, and
            with 0 none has.
        tokens: of a row.
        late: if above 0, one more cell of sampled training for each engine, in which a rank is late.
    """

    def cells() -> Iterator[Cell]:
        for size in sizes:
            for number in sorted(processes):
                shares = [rows] + ([total_rows // number] if total_rows and total_rows % number == 0 else [])
                for engine in engines if number > 1 else ["none"]:
                    base = {"size": size, "processes": number, "engine": engine, "tokens": tokens}
                    for share in dict.fromkeys(shares):
                        for method in methods:
                            yield Cell(method=method, rows=share, **base)
                    if late and number > 1 and "sampled" in methods:
                        yield Cell(method="sampled", rows=rows, late=late, **base)

    return list(dict.fromkeys(cells()))
