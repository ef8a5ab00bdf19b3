"""Processes of their own that begin with PyTorch, transformers and PEFT imported, and nothing of this library.

Importing those takes longer than most tests do. Python's fork server imports them once for all tests of a pytest
process, and each process that a test asks for is forked from it: a real one, with its own streams, signals and exit
status. Unlike processes that a shell starts they share the salt of Python's hashes, and so the order of their sets of
strings; distributed/test_launchers.py has processes that do not.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

PRELOADED = ["torch", "transformers.trainer", "peft", "trl.trainer.sft_trainer"]


@lru_cache(maxsize=1)
def fork_server() -> Any:
    """The context whose processes are forked from one that has imported `PRELOADED`, as far as it is installed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def begin(script: str, arguments: list[str], env: dict[str, str], streams: list[str]) -> None:
    """What a new process does: become one that Python has just started with this script.

    Raises:
        SystemExit: as the script ends.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # under nohup one is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, name in enumerate((os.devnull, *streams)):
        os.dup2(os.open(name, os.O_RDWR), descriptor)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[:] = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    import numpy
    import torch

    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    random.seed()  # no two processes draw the same
    numpy.random.seed()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


class Forked:
    """A process that runs a script; what it has is as `subprocess.Popen` has it.

    Args:
        script: a file of Python, run as `__main__`.
        arguments: what follows in `sys.argv`.
        env: its environment; None is this process's.
    """

    def __init__(self, script: str | Path, *arguments: object, env: Mapping[str, str] | None = None) -> None:
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder)
        self._streams = [Path(folder, name) for name in ("out", "error")]
        for file in self._streams:
            file.touch()
        self.args = [str(script), *map(str, arguments)]
        environment = {**(os.environ if env is None else env)}
        environment.setdefault("OMP_NUM_THREADS", "1")
        self._process = fork_server().Process(
            target=begin, args=(self.args[0], self.args[1:], environment, [*map(str, self._streams)])
        )
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, None while it runs, and -N where signal N ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As `returncode`."""
        return self.returncode

    def kill(self) -> None:
        """End it; one that has ended stays as it is."""
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote, when it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not ended in so many seconds, and still runs.
        """
        self._process.join(timeout)
        if timeout is not None and self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        out, error = (file.read_text() for file in self._streams)
        return out, error

    def completed(self, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """How it ended.

        Raises:
            subprocess.TimeoutExpired: it has not ended in so many seconds, and is killed.
        """
        try:
            out, error = self.communicate(timeout)
        finally:
            self.kill()
        assert self.returncode is not None
        return subprocess.CompletedProcess(self.args, self.returncode, out, error)


def run(code: str, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """A piece of code in a process of its own, to its end."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(code)
        return Forked(script, *arguments).completed(timeout)
