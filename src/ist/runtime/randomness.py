"""Randomness that leaves the training's alone: seeds by key, and generators put back.

A generator is made afresh from a seed, a purpose and a step, so that a draw depends on nothing that came before. Every
process of a distributed run draws the same, and a resumed run the same as an uninterrupted one, without a generator's
state being sent or saved.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["keyed_generator", "keyed_seed", "private_randomness"]


def keyed_seed(seed: int, purpose: str, step: int) -> int:
    """A 63-bit seed for one purpose at one step, unrelated to that of its neighbours."""
    digest = hashlib.blake2b(f"ist:{seed}:{purpose}:{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed_generator(seed: int, purpose: str, step: int, generator: torch.Generator | None = None) -> torch.Generator:
    """A CPU generator that depends on `(seed, purpose, step)` alone; `generator` set to that, which is far sooner done
    than to make one.
    """
    return (generator or torch.Generator()).manual_seed(keyed_seed(seed, purpose, step))


@contextmanager
def private_randomness(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Within the context the global generators are seeded with `seed`; afterwards they are as they were.

    Covers torch on the CPU and on `device`, Python's `random` and, where it is imported, NumPy's global generator.
    """
    numpy_random = sys.modules.get("numpy.random")
    python_state = random.getstate()
    numpy_state = numpy_random.get_state() if numpy_random else None
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            # Not torch.manual_seed, which would also seed the generators of devices that are not put back.
            torch.random.default_generator.manual_seed(seed % 2**63)
            if devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed % 2**63)
            random.seed(seed)
            if numpy_random:
                numpy_random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(python_state)
            if numpy_random:
                numpy_random.set_state(numpy_state)
