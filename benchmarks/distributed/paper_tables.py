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
from grid import METHODS  # noqa: E402
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

__all__ = ["beyond_table", "machines_of", "memory_table"]

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
    """GiB by shape and method: the parts of the whole, and what the rank that holds the most holds."""
    numbers = (2, 4, 8)
    lines = []
    for size in SIZES:
        for method in METHODS:
            whole = state_bytes(size, method, "none", 1)[0]
            activations = activation_bytes(size, method, ROWS, TOKENS)
            totals = [sum(whole.values()) + activations]
            for processes in numbers:
                kept = max(sum(held.values()) for held in state_bytes(size, method, "fsdp2", processes))
                *units, root = gathered_bytes(size, method, processes)
                totals.append(kept + root + GATHERED_AT_ONCE * max(units) + activations)
            parts = (whole["base"], sum(whole.values()) - whole["base"], activations, *totals)
            lines.append((size, METHODS[method], *(f"{part / GIB:.1f}" for part in parts)))
    header = (
        *("shape", "method", "base weights", "adapters, gradients, Adam", "activations of a GPU"),
        *("in all: one GPU, or DDP", *(f"FSDP2, {number} GPUs" for number in numbers)),
    )
    note = (
        f"GiB on each GPU, on paper: {ROWS} × {TOKENS} tokens on each, bfloat16 weights, float32 adapters of rank 32 "
        "on five modules (focused: rank 64 in half of the layers), AdamW, no activation checkpointing."
    )
    return f"{markdown(header, lines)}\n\n{note}"


def machines_of(rows: Sequence[Row]) -> tuple[dict[str, Machine], str]:
    """What a GPU reaches with each method, and where that comes from: the results of run.py on one kind of GPU, or
    without any on several GPUs the one card that was measured.
    """
    steps: dict[str, list[Work]] = {method: [] for method in METHODS}
    for row in rows:
        if row.error is None and not row.cell.late:
            flops = work(row.cell.size, row.cell.method, row.cell.rows, row.cell.tokens)
            received = received_bytes(row.counted, row.cell.engine, row.cell.processes)
            steps[row.cell.method].append(Work(flops, received, row.step))
    if all(any(step.received for step in own) for own in steps.values()):
        return {method: fit(own) for method, own in steps.items()}, f"fitted to {sum(map(len, steps.values()))} steps"
    old = json.loads(ONE_CARD.read_text(encoding="utf-8"))
    batch = old["config"]["batch_size"], old["config"]["length"]
    seconds = {row["method"]: row["median_step_seconds"] for row in old["rows"] if row["processes"] == 1}
    lora = fit([Work(work("7b", "lora", *batch), 0, seconds["lora"])]).flops
    sampled = fit([Work(work("7b", "sampled", *batch), 0, seconds["ist"])]).flops
    rates = {"lora": lora, "sampled": sampled, "focused": lora}
    origin = (
        f"rates of LoRA and IST at LLaMA-7B's shape on one {old['device']} (of focused training: LoRA's); no step on "
        "several GPUs was measured, so bandwidths are the makers' figures"
    )
    return {method: Machine(rate, Links.inside) for method, rate in rates.items()}, origin


def beyond_table(rows: Sequence[Row]) -> str:
    """Seconds of a step on several nodes: with all of the communication hidden, and with nothing of it."""
    machines, origin = machines_of(rows)
    lines = []
    for size in SIZES:
        for layout, seconds in (("FSDP2 over all GPUs", across_nodes), ("hybrid: FSDP2 in a node", across_replicas)):
            for method, machine in machines.items():
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
    reached = "; ".join(
        f"{METHODS[method]}: {machine.flops / 1e12:.0f} TFLOP/s, {machine.bandwidth / 1e9:.0f} GB/s within a node, "
        f"{machine.overhead * 1e3:.0f} ms of a step besides"
        for method, machine in machines.items()
    )
    note = (
        f"By the model, not measured: {origin}. {reached}. Between nodes {Links.between / 1e9:.0f} GB/s of each GPU "
        f"(assumed). {ROWS} × {TOKENS} tokens on each GPU, steps without a measurement of importance."
    )
    return f"{markdown(header, lines)}\n\n{note}"
