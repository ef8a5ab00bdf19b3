"""How much of a GPU's memory trainings side by side take, so that none is started that would not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Memory", "device_memory"]

SHARE = 0.95
"""The part of the memory that trainings may take."""
PROCESS = 0.7 * 2**30
"""What a process takes beside its tensors: the CUDA context and the kernels."""
CACHED = 1.2
"""What PyTorch reserves to what tensors take, where a line has the latter alone."""


class Memory:
    """Whether one more training fits, by the peaks of finished ones of its task and method.

    A training whose like is not known takes as much as the largest of its task, or of all. While none is known all
    fit: one that fails for want of memory is put back.

    Args:
        total: bytes that trainings may take of all devices together, among which a pool spreads its processes evenly;
            None is no limit.
        lines: results so far, by id.
    """

    def __init__(self, total: float | None, lines: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.total = total
        self._peaks: dict[tuple[str, ...], float] = {}
        for line in (lines or {}).values():
            self.note(line)

    def note(self, line: Mapping[str, Any]) -> None:
        """Remember what a finished training took."""
        taken = line.get("device_memory_bytes") or CACHED * (line.get("peak_memory_bytes") or 0)
        if taken and "error" not in line:
            for key in keys(line):
                self._peaks[key] = max(taken, self._peaks.get(key, 0))

    def expected(self, training: Mapping[str, Any]) -> float:
        """Bytes that a training will take of the device; 0 where nothing is known."""
        known = next((self._peaks[key] for key in keys(training) if key in self._peaks), None)
        return 0.0 if known is None else known + PROCESS

    def fits(self, training: Mapping[str, Any], running: Iterable[Mapping[str, Any]]) -> bool:
        """Whether a training fits beside those that run; one alone always does."""
        others = list(running)
        if self.total is None or not others:
            return True
        return self.expected(training) + sum(map(self.expected, others)) <= self.total


def keys(training: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """Of what trainings the peak says what this one will take, the nearest first."""
    return (training["task"], training["method"]), (training["task"],), ()


def device_memory(device: str) -> float | None:
    """Bytes that trainings may take of all GPUs together; None on a CPU."""
    if device != "cuda":
        return None
    import torch

    sizes = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
    return SHARE * sum(sizes)
