"""Tables on paper: memory of each rank, and steps beyond a node by the model of model.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from bytes_on_paper import activation_bytes, gathered_bytes, shapes, state_bytes  # noqa: E402
from fitted import fitted_rows, machines_of, worst_errors  # noqa: E402
from grid import METHODS  # noqa: E402
from model import across_nodes, across_replicas, num_collectives, predict, traffic, work  # noqa: E402
from scaling import Row, sources  # noqa: E402

from harness import GIB  # noqa: E402
from pages import markdown  # noqa: E402

__all__ = ["beyond_table", "measured_memory_table", "memory_table"]

SIZES = ("13b", "70b")
ROWS, TOKENS = 2, 512
PER_NODE = 8
NODES = (1, 2, 4)
GATHERED_AT_ONCE = 3
"""Layers whose whole weights FSDP2 holds at a time: in use, gathered ahead, and in the buffer of the gather."""
BETWEEN = 50e9
"""Bytes a second of one GPU's network card, by the makers' figures: real transfers reach less."""


def peak_on_paper(size: str, method: str, engine: str, processes: int, rows: int = ROWS, tokens: int = TOKENS) -> int:
    """Bytes of the rank that holds the most, with DDP's buckets, or the weights that FSDP2 gathers for a moment."""
    kept = max(sum(held.values()) for held in state_bytes(size, method, engine, processes))
    activations = activation_bytes(size, method, rows, tokens)
    if engine == "ddp":  # Buckets for the gradients of all adapters.
        return (
            kept + activations + sum(prod(shape) * width for _, shape, width, trains in shapes(size, method) if trains)
        )
    if engine == "none":
        return kept + activations
    *units, root = gathered_bytes(size, method, processes)
    return kept + root + GATHERED_AT_ONCE * max(units) + activations


def memory_table() -> str:
    """GiB by shape and method: the parts of the whole, and what the rank that holds the most holds."""
    numbers = (2, 4, 8)
    lines = []
    for size in SIZES:
        for method in METHODS:
            whole = state_bytes(size, method, "none", 1)[0]
            totals = (
                peak_on_paper(size, method, "none", 1),
                peak_on_paper(size, method, "ddp", 2),
                *(peak_on_paper(size, method, "fsdp2", number) for number in numbers),
            )
            activations = activation_bytes(size, method, ROWS, TOKENS)
            parts = (whole["base"], sum(whole.values()) - whole["base"], activations, *totals)
            lines.append((size, METHODS[method], *(f"{part / GIB:.1f}" for part in parts)))
    header = (
        *("shape", "method", "base weights", "adapters, gradients, Adam", "activations of a GPU"),
        *("in all: one GPU", "DDP", *(f"FSDP2, {number} GPUs" for number in numbers)),
    )
    note = (
        f"GiB on each GPU, on paper: {ROWS} × {TOKENS} tokens on each, bfloat16 weights, float32 adapters of rank 32 "
        "on five modules (focused: rank 64 in half of the layers), AdamW, no activation checkpointing."
    )
    return f"{markdown(header, lines)}\n\n{note}"


def measured_memory_table(rows: Sequence[Row]) -> str:
    """Peak memory of the cells that ran with the batch of the table on paper, beside what is on paper."""
    columns = (("none", 1), ("ddp", 2), ("fsdp2", 2))
    peaks = {
        (row.cell.size, row.cell.method, row.cell.engine, row.cell.processes): max(row.line["peak_bytes"])
        for row in fitted_rows(rows)
        if (row.cell.rows, row.cell.tokens) == (ROWS, TOKENS)
    }
    lines = []
    for size in SIZES:
        for method in METHODS:
            found = [peaks.get((size, method, *column)) for column in columns]
            if any(found):
                paper = (peak_on_paper(size, method, *column) for column in columns)
                pairs = zip(paper, found, strict=True)
                cells = (
                    text
                    for on_paper, peak in pairs
                    for text in (f"{on_paper / GIB:.1f}", f"{peak / GIB:.1f}" if peak else "not run")
                )
                lines.append((size, METHODS[method], *cells))
    if not lines:
        return ""
    names = ("one GPU", "DDP, 2 GPUs", "FSDP2, 2 GPUs")
    header = ("shape", "method", *(text for name in names for text in (f"{name}: on paper", "measured")))
    note = f"Peak GiB of the rank that held the most. {sources([row for row in rows if row.error is None])}"
    return f"{markdown(header, lines)}\n\n{note}"


def beyond_table(rows: Sequence[Row]) -> str:
    """Seconds of a step on several nodes by the model, as wide as the model was wrong; empty without a model."""
    machines = machines_of(rows)
    if not machines:
        return ""
    least, most = worst_errors(rows)
    lines = []
    for size in SIZES:
        for layout, seconds in (("FSDP2 over all GPUs", across_nodes), ("hybrid: FSDP2 in a node", across_replicas)):
            cells = []
            for nodes in NODES:
                sharers = nodes * PER_NODE if seconds is across_nodes else PER_NODE
                steps = []
                for method, machine in machines.items():
                    counted = traffic(size, method, "fsdp2", sharers)
                    moved = seconds(counted, nodes, PER_NODE, machine.bandwidth, BETWEEN)
                    collectives = num_collectives(size, method)
                    steps.append(moved + predict(machine, work(size, method, ROWS, TOKENS), 0, collectives))
                cells.append(f"{min(steps) * least:#.2g} to {max(steps) * most:#.2g} s")
            lines.append((size, layout, *cells))
    header = ("shape", "layout", *(f"{nodes} × {PER_NODE} GPUs" for nodes in NODES))
    note = (
        f"By the model, not measured: from {least:.2f} times the fastest method's step to {most:.2f} times the "
        "slowest's, as measured steps were so many times what other rows or the other shape predict. Between nodes "
        f"{BETWEEN / 1e9:.0f} GB/s of each GPU (assumed, a network card of {BETWEEN * 8 / 1e9:.0f} Gbit/s). {ROWS} × "
        f"{TOKENS} tokens on each GPU, steps without a measurement of importance."
    )
    return f"{markdown(header, lines)}\n\n{note}"
