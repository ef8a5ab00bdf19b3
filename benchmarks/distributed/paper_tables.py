"""Tables on paper: memory of each rank, and steps beyond a node by the model of model.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from bytes_on_paper import activation_bytes, gathered_bytes, state_bytes  # noqa: E402
from grid import ENGINES, METHODS  # noqa: E402
from model import (  # noqa: E402
    Machine,
    Work,
    across_nodes,
    across_replicas,
    fit,
    predict,
    received_bytes,
    traffic,
    work,
)
from scaling import Row  # noqa: E402

from harness import GIB  # noqa: E402
from pages import markdown  # noqa: E402

__all__ = ["beyond_table", "machine_of", "memory_table"]

SIZES = ("13b", "70b")
ROWS, TOKENS = 2, 512
PER_NODE = 8
NODES = (1, 2, 4)
GATHERED_AT_ONCE = 3
"""Layers whose whole weights FSDP2 holds at a time: in use, gathered ahead, and in the buffer of the gather."""
ONE_CARD = HERE / "results" / "h100.json"


@dataclass(frozen=True)
class Links:
    """Bytes a second that a GPU receives, by the makers' figures: real transfers reach less."""

    inside: float = 450e9
    """NVLink of the fourth generation, one direction."""
    between: float = 50e9
    """A network card of 400 Gbit/s for each GPU."""


def memory_table() -> str:
    """GiB of the rank that holds the most, by shape, method, backend and number of GPUs."""
    lines = []
    for size in SIZES:
        for method in METHODS:
            for engine, processes in (("none", 1), ("fsdp2", 2), ("fsdp2", 4), ("fsdp2", 8)):
                state = max(state_bytes(size, method, engine, processes), key=lambda held: sum(held.values()))
                *units, root = gathered_bytes(size, method, processes)
                gathered = root + GATHERED_AT_ONCE * max(units) if engine == "fsdp2" else 0
                base, training = state["base"], sum(state.values()) - state["base"]
                parts = (base, training, gathered, activation_bytes(size, method, ROWS, TOKENS))
                numbers = [f"{part / GIB:.1f}" if part else "–" for part in (*parts, sum(parts))]
                backend = "one GPU, or DDP" if engine == "none" else f"{ENGINES[engine]}, {processes} GPUs"
                lines.append((size, METHODS[method], backend, *numbers))
    header = (
        *("shape", "method", "backend", "base weights", "adapters, gradients, Adam", "gathered for a moment"),
        *("activations", "in all"),
    )
    note = (
        f"GiB on each GPU, on paper: {ROWS} × {TOKENS} tokens on each, bfloat16 weights, float32 adapters of rank 32 "
        "on five modules (focused: rank 64 in half of the layers), AdamW, no activation checkpointing."
    )
    return f"{markdown(header, lines)}\n\n{note}"


def machine_of(rows: Sequence[Row]) -> tuple[Machine, str]:
    """What a GPU reaches, from the results of run.py on GPUs; without any, from the one card that was measured."""
    steps = [
        Work(
            work(row.cell.size, row.cell.method, row.cell.rows, row.cell.tokens),
            received_bytes(row.counted, row.cell.engine, row.cell.processes),
            row.step,
        )
        for row in rows
        if row.on_gpu and row.error is None and not row.cell.late
    ]
    if any(step.received for step in steps):
        machine = fit(steps)
        return machine, f"fitted to {len(steps)} measured steps"
    old = json.loads(ONE_CARD.read_text(encoding="utf-8"))
    config = old["config"]
    (lora,) = (row for row in old["rows"] if row["processes"] == 1 and row["method"] == "lora")
    flops = work("7b", "lora", config["batch_size"], config["length"])
    rate = fit([Work(flops, 0, lora["median_step_seconds"])]).flops
    given = "; no step on several GPUs was measured, so bandwidths are the makers' figures"
    return Machine(rate, Links.inside), f"rate of LoRA at LLaMA-7B's shape on one {old['device']}{given}"


def beyond_table(rows: Sequence[Row]) -> str:
    """Seconds of a step on several nodes: with all of the communication hidden, and with nothing of it."""
    machine, origin = machine_of(rows)
    lines = []
    for size in SIZES:
        for layout, seconds in (("FSDP2 over all GPUs", across_nodes), ("hybrid: FSDP2 in a node", across_replicas)):
            for method in METHODS:
                cells = []
                for nodes in NODES:
                    sharers = nodes * PER_NODE if seconds is across_nodes else PER_NODE
                    counted = traffic(size, method, "fsdp2", sharers)
                    moved = seconds(counted, nodes, PER_NODE, machine.bandwidth, Links.between)
                    flops = work(size, method, ROWS, TOKENS)
                    low, high = predict(machine, flops, moved * machine.bandwidth)
                    cells.append(f"{low:.2f} to {high:.2f} s")
                lines.append((size, layout, METHODS[method], *cells))
    header = ("shape", "layout", "method", *(f"{nodes} × {PER_NODE} GPUs" for nodes in NODES))
    note = (
        f"By the model, not measured. f = {machine.flops / 1e12:.0f} TFLOP/s, b = {machine.bandwidth / 1e9:.0f} GB/s "
        f"within a node, {Links.between / 1e9:.0f} GB/s of each GPU between nodes (assumed), "
        f"h = {machine.overhead * 1e3:.0f} ms: {origin}. {ROWS} × {TOKENS} tokens on each GPU, no measurements."
    )
    return f"{markdown(header, lines)}\n\n{note}"
