"""What a step costs on more GPUs than were measured, on paper: a model, not a measurement.

    T = h + C + M
    C = F / f            work over rate
    M = n c + B / b      collectives, and bytes over bandwidth

with seconds `T` of a step, its floating-point operations `F` on each GPU, its collectives `n`, the bytes `B` that each
GPU receives, and four numbers of a machine: the rate `f` that it reaches, what a collective costs, `c`, the bandwidth
`b`, and what a step takes besides, `h`. `fit` finds them in measured steps: a rate for each method, as each runs other
kernels, and one `c`, one `b` and one `h` for all. They are effective numbers: `c` holds all that a host does for a
collective, `b` nothing of what is hidden behind computation; `f` holds the launches of all other kernels.

Per token, a linear layer of `P` weights takes `2P` operations forward and `2P` for the gradient of its input; its
weights' gradient is needed for adapters alone. The backward stops at the lowest layer that trains. Attention takes
`4·s·h` forward for `s` tokens and width `h` (half of that is masked, and computed all the same by most kernels), and
twice that backward.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from bytes_on_paper import gathered_bytes, num_layers, shapes, trained_layers

from harness import model_config

__all__ = [
    "Machine",
    "Traffic",
    "Work",
    "fit",
    "lowest_layer",
    "num_collectives",
    "predict",
    "received_bytes",
    "traffic",
    "work",
]


@dataclass(frozen=True)
class Machine:
    """What one GPU reaches, fitted or assumed."""

    flops: float
    """`f`: floating-point operations a second."""
    bandwidth: float
    """`b`: bytes a second that a GPU receives; infinite where communication costs nothing."""
    overhead: float = 0.0
    """`h`: seconds of a step besides."""
    collective: float = 0.0
    """`c`: seconds that a collective adds, whatever its bytes."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step at the collectives, as `collectives.CollectiveBytes` counts them."""

    gathered: float
    """Results of all-gathers."""
    reduced: float
    """Inputs of reductions."""


def lowest_layer(size: str, method: str) -> float:
    """The lowest layer that trains, from 0: of `k` of `L` layers drawn uniformly, `(L − k) / (k + 1)` on average.

    Focused training has every second layer, from the second on (an even spread), unless importance says otherwise.
    """
    layers, trained = num_layers(size), trained_layers(size, method)
    if method == "sampled":
        return (layers - trained) / (trained + 1)
    return {"lora": 0, "focused": 1}[method]


@lru_cache
def work(size: str, method: str, rows: int, tokens: int) -> float:
    """`F`: floating-point operations of a step on each GPU."""
    layers, trained = num_layers(size), trained_layers(size, method)
    reached = (layers - lowest_layer(size, method)) / layers
    config: Any = model_config(size)
    in_layers, head, adapters = 0, config.vocab_size * config.hidden_size, 0
    for name, shape, _, trains in shapes(size, method):
        if "lora" in name and trains:
            adapters += shape[0] * shape[1]
        elif ".layers." in name and len(shape) == 2:
            in_layers += shape[0] * shape[1]
    attention = 4 * tokens * config.hidden_size * layers
    # Adapters of frozen layers pass a gradient on and get none: of sampled training, a quarter of them gets one.
    passed, own = (reached, trained / layers) if method == "sampled" else (1.0, 1.0)
    per_token = (
        2 * (in_layers + head)
        + 2 * (in_layers * reached + head)
        + attention * (1 + 2 * reached)
        + adapters * (2 + 2 * passed + 2 * own)
    )
    return rows * tokens * per_token


@lru_cache
def traffic(size: str, method: str, engine: str, processes: int) -> Traffic:
    """Bytes of a step at the collectives.

    DDP reduces the gradients of the layers that train. FSDP2 reduces them too, and gathers all weights of a layer for
    its forward, and again for its backward where that comes by. The root's weights stay from forward to backward.
    """
    if processes == 1 or engine == "none":
        return Traffic(0, 0)
    gradients, padded = 0, 0
    for _, shape, width, trains in shapes(size, method):
        if trains:
            count = shape[0] * shape[1]
            gradients += count * width
            padded += -(-shape[0] // processes) * processes * shape[1] * width
    part = trained_layers(size, method) / num_layers(size) if method == "sampled" else 1.0
    if engine == "ddp":
        return Traffic(0, gradients * part)
    *units, root = gathered_bytes(size, method, processes)
    spared = lowest_layer(size, method)
    whole = int(spared)
    skipped = sum(units[:whole]) + (spared - whole) * units[whole]
    return Traffic(root + 2 * sum(units) - skipped, padded * part)


def num_collectives(size: str, method: str) -> float:
    """`n` of a step under FSDP2: gathers for the forward, of the root too, and for the backward, and reductions."""
    layers = num_layers(size)
    return layers + 1 + (layers - lowest_layer(size, method)) + trained_layers(size, method)


def received_bytes(counted: Traffic, engine: str, processes: int) -> float:
    """`B`: bytes that each GPU receives, by ring algorithms.

    An all-gather and a reduce-scatter of `S` bytes over `n` processes move `S (n − 1) / n` to each, an all-reduce
    twice that.
    """
    ring = (processes - 1) / processes
    return ring * (counted.gathered + counted.reduced * (2 if engine == "ddp" else 1))


@dataclass(frozen=True)
class Work:
    """A measured step, in the terms of the model."""

    flops: float
    received: float
    collectives: float
    seconds: float


def fit(steps: Mapping[str, Sequence[Work]]) -> dict[str, Machine]:
    """The machine that explains measured steps best, as each method uses it: a rate of its own, and the bandwidth, the
    cost of a collective and the overhead of all.

    Least squares of relative errors, without negative numbers. What the steps cannot show has no cost: with no step
    that communicates, the bandwidth is infinite and a collective costs nothing, and where all steps of a method have
    the same operations, nothing tells the overhead from the rate.

    Args:
        steps: of each method; one without steps gets no machine.

    Raises:
        ValueError: no step, or none that rates explain.
    """
    methods = [method for method, own in steps.items() if own]
    if not methods:
        raise ValueError("There is no measured step to fit to: run benchmarks/distributed/run.py first.")
    columns = np.array(
        [
            [*(step.flops * (name == method) for name in methods), step.received, step.collectives, 1.0]
            for method in methods
            for step in steps[method]
        ]
    )
    columns /= np.array([[step.seconds] for method in methods for step in steps[method]])
    scale = columns.max(axis=0)
    scale[scale == 0] = 1
    columns /= scale
    rates, shared = [*range(len(methods))], range(len(methods), len(methods) + 3)
    best: tuple[float, Any] | None = None
    for more in chain.from_iterable(combinations(shared, number) for number in range(len(shared) + 1)):
        chosen = columns[:, [*rates, *more]]
        if np.linalg.matrix_rank(chosen) < chosen.shape[1]:
            continue
        found = np.linalg.lstsq(chosen, np.ones(len(columns)), rcond=None)[0]
        error = float(np.square(chosen @ found - 1).sum())
        if found.min() > 0 and (best is None or error < best[0] - 1e-12):
            costs = np.zeros(len(scale))
            costs[[*rates, *more]] = found
            best = error, costs / scale
    if best is None:
        raise ValueError("No rates explain these steps: measure steps of several sizes.")
    *per_operation, per_byte, per_collective, besides = map(float, best[1])
    bandwidth = 1 / per_byte if per_byte else float("inf")
    return {
        method: Machine(1 / cost, bandwidth, besides, per_collective)
        for method, cost in zip(methods, per_operation, strict=True)
    }


def predict(machine: Machine, flops: float, received: float, collectives: float = 0.0) -> float:
    """`T`: seconds of a step."""
    computation = machine.overhead + flops / machine.flops
    return computation + collectives * machine.collective + received / machine.bandwidth


def across_nodes(counted: Traffic, nodes: int, per_node: int, inside: float, between: float) -> float:
    """`B / b` of FSDP2 over all GPUs of several nodes: seconds of a step's bytes.

    A ring enters and leaves each node once, over the network cards of all its GPUs together.

    Args:
        counted: a step's traffic.
        nodes: how many.
        per_node: GPUs of each.
        inside: bytes a second that a GPU receives within its node.
        between: bytes a second of one GPU's network card.
    """
    payload = counted.gathered + counted.reduced
    size = nodes * per_node
    here = payload * (size - 1) / size / inside
    there = payload * (size - 1) / size / (between * per_node) if nodes > 1 else 0.0
    return max(here, there)


def across_replicas(counted: Traffic, nodes: int, per_node: int, inside: float, between: float) -> float:
    """`B / b` of hybrid sharding: weights split within each node, and gradients alone reduced between nodes.

    Takes what `across_nodes` takes; `counted` is one node's.
    """
    ring = (per_node - 1) / per_node
    here = (counted.gathered + counted.reduced) * ring / inside
    there = 2 * (nodes - 1) / nodes * counted.reduced / per_node / between
    return here + there
