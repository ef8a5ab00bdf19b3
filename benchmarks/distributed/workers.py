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

__all__ = ["GO", "CellError", "Workers", "launch", "wait_for_go"]

GO = "GO_FILE"
"""Environment variable with the path of the file that processes wait for."""

GRACE = 3.0
"""Seconds for the other processes to say why they fail, after the first one has."""
POLL = 0.05


class CellError(Exception):
    """Why a cell has no figures."""


class Workers:
    """Processes of one process group, as torchrun would start them on one node; a context that ends them.

    The parent keeps the group's store, at a port that the system picks, as torchrun's agent does. Processes that call
    `wait_for_go` prepare what needs no GPU and then wait, so that they can be started while others still run.

    Args:
        command: a script and its arguments.
        processes: how many; each is told its rank.
        limit: seconds from `finish` on.
    """

    def __init__(self, command: Sequence[str], processes: int, limit: float) -> None:
        self._limit = limit
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._go = folder / "go"
        self._store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=limit)
        )
        shared = {
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            GO: str(self._go),
        }
        self._logs = [folder / f"{rank}.txt" for rank in range(processes)]
        self._started: list[subprocess.Popen[bytes]] = []
        try:
            for rank, log in enumerate(self._logs):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                with log.open("w", encoding="utf-8") as errors:
                    self._started.append(
                        subprocess.Popen([sys.executable, *command], env=own, stdout=subprocess.DEVNULL, stderr=errors)
                    )
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.kill()
            process.wait()
        self._folder.cleanup()

    def finish(self) -> None:
        """Let the processes run, until all have ended.

        Raises:
            CellError: a process failed, with the last line of its errors, or the time was over.
        """
        self._go.touch()
        failed = wait(self._started, self._limit)
        if failed is not None:
            raise CellError(reason(failed, self._started[failed].returncode, self._logs[failed]))


def launch(command: Sequence[str], processes: int, limit: float) -> None:
    """Run `python *command` in processes of one process group, for so many seconds at most: `Workers`."""
    with Workers(command, processes, limit) as workers:
        workers.finish()


def wait_for_go() -> None:
    """In a process of `Workers`: wait until its parent lets it run, and end with the parent."""
    parent = os.getppid()
    while not os.path.exists(os.environ[GO]):
        if os.getppid() != parent:
            sys.exit("the program that started this process has ended")
        time.sleep(POLL)


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
