"""Start the same command in several processes, as torchrun does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from device import ON_CPUS

from tests.helpers.processes import Forked


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(command: Sequence[str | Path], env: Mapping[str, str]) -> Forked | subprocess.Popen[str]:
    if ON_CPUS:
        return Forked(*command, env=env)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, stdout=pipe, stderr=pipe, text=True)


def launch(
    command: Sequence[str | Path],
    num_processes: int,
    timeout: float = 240,
    env: Mapping[str, str] | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """Run `python *command` in processes that know each other, and wait for all of them.

    On CPUs they are forked from one that has imported the libraries.

    Returns:
        Exit status and output of each. When one fails, the others have ten seconds to end, and are ended then.

    Raises:
        subprocess.TimeoutExpired: none has failed, and one has not ended in time.
    """
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "TOKENIZERS_PARALLELISM": "false",
        **(env or {}),
    }
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    processes = [start(command, environment) for environment in ranks]
    finished = []
    try:
        for process in processes:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                if not any(other.poll() for other in processes):
                    raise
                process.kill()  # So that what the failed one has said is seen.
                out, err = process.communicate()
            status = process.returncode
            assert status is not None
            finished.append(subprocess.CompletedProcess(process.args, status, out, err))
            timeout = timeout if status == 0 else 10
    finally:
        for process in processes:
            process.kill()
    return finished


def found_by_both(worker: Path, folder: Path, *arguments: str) -> Any:
    """What two processes of a worker find, each in a `found.RANK.json` in the folder that it is given: the same."""
    finished = launch([worker, folder, *arguments], 2)
    assert all(process.returncode == 0 for process in finished), finished[0].stderr[-3000:]
    first, second = (json.loads((folder / f"found.{rank}.json").read_text()) for rank in range(2))
    assert first == second
    return first
