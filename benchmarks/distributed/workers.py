"""Starts the processes of a cell, and ends all of them when one fails or the time is over."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from torch import distributed as dist

__all__ = ["CellError", "launch"]

GRACE = 3.0
"""Seconds for the other processes to say why they fail, after the first one has."""
POLL = 0.05


class CellError(Exception):
    """Why a cell has no figures."""


def launch(command: Sequence[str], processes: int, limit: float) -> None:
    """Run `python *command` in processes of one process group, as torchrun would on one node.

    The parent keeps the group's store, at a port that the system picks, as torchrun's agent does.

    Args:
        command: a script and its arguments.
        processes: how many; each is told its rank.
        limit: seconds for all of it.

    Raises:
        CellError: a process failed, with the last line of its errors, or the time was over.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=limit))
    shared = {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{rank}.txt" for rank in range(processes)]
        started = []
        try:
            for rank, log in enumerate(logs):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                with log.open("w", encoding="utf-8") as errors:
                    started.append(
                        subprocess.Popen([sys.executable, *command], env=own, stdout=subprocess.DEVNULL, stderr=errors)
                    )
            failed = wait(started, limit)
            if failed is not None:
                raise CellError(reason(failed, started[failed].returncode, logs[failed]))
        finally:
            for process in started:
                process.kill()
                process.wait()


def wait(started: Sequence[subprocess.Popen[bytes]], limit: float) -> int | None:
    """Wait for all processes; returns the rank of the first that failed, or None.

    Raises:
        CellError: the time is over.
    """
    end = time.monotonic() + limit
    while any(process.poll() is None for process in started):
        bad = [rank for rank, process in enumerate(started) if process.returncode]
        if bad:
            time.sleep(GRACE)
            return bad[0]
        if time.monotonic() > end:
            running = [str(rank) for rank, process in enumerate(started) if process.returncode is None]
            raise CellError(f"not done after {limit:.0f} s (still running: rank {', '.join(running)})")
        time.sleep(POLL)
    return next((rank for rank, process in enumerate(started) if process.returncode), None)


def reason(rank: int, status: int | None, log: Path) -> str:
    """The last line that a rank wrote, or its exit status."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"rank {rank}: {lines[-1][:300] if lines else f'exit status {status}'}"
