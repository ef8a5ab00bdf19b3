"""Processes of their own that begin with PyTorch, transformers and PEFT imported, and nothing of this library.

Importing those takes longer than most tests do. One process imports them once for all tests of a pytest process, and
each process that a test asks for is forked from it: a real one, with its own streams, signals and exit status.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SERVER = """
import json, os, signal, sys, traceback, warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch, transformers.trainer, peft
    try:
        import trl.trainer.sft_trainer
    except ImportError:
        pass
assert "ist" not in sys.modules

def child(code, arguments, out, error):
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # under nohup one is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, descriptor in ((os.devnull, 0), (out, 1), (error, 2)):
        os.dup2(os.open(name, os.O_RDWR), descriptor)
    sys.argv[1:] = arguments
    status = 0
    try:
        exec(compile(code, "<process of a test>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        if not (stop.code is None or isinstance(stop.code, int)):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

for line in iter(sys.stdin.readline, ""):
    if not (pid := os.fork()):
        child(*json.loads(line))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@lru_cache(maxsize=1)
def server() -> subprocess.Popen[str]:
    """The process that others are forked from; it ends with this one."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    atexit.register(process.kill)
    return process


class Forked:
    """A process that runs a piece of code, one at a time.

    Args:
        code: Python, run as `__main__`.
        arguments: what follows in `sys.argv`.
    """

    def __init__(self, code: str, *arguments: object) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name) / name for name in ("out", "error")]
        for file in self._streams:
            file.touch()
        self._send([code, [str(argument) for argument in arguments], *map(str, self._streams)])
        self.pid = int(self._answer(120))

    def wait(self, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """How it ended and what it wrote.

        Raises:
            TimeoutError: it has not ended in so many seconds, and is killed.
        """
        try:
            status = int(self._answer(timeout))
        except TimeoutError:
            os.kill(self.pid, 9)
            self._answer(timeout)
            raise
        out, error = (file.read_text() for file in self._streams)
        self._folder.cleanup()
        return subprocess.CompletedProcess([str(self.pid)], status, out, error)

    def _send(self, request: Any) -> None:
        stream = server().stdin
        assert stream is not None
        print(json.dumps(request), file=stream, flush=True)

    def _answer(self, timeout: float) -> str:
        stream = server().stdout
        assert stream is not None
        if not select.select([stream], [], [], timeout)[0]:
            raise TimeoutError(f"No answer of process {getattr(self, 'pid', 'server')} in {timeout} s.")
        return stream.readline()


def run(code: str, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """A piece of code in a process of its own, to its end."""
    return Forked(code, *arguments).wait(timeout)
