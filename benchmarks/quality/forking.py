"""How the processes of a pool begin: forked from one that has imported the libraries, where CUDA allows that."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["GRACE", "LIBRARIES", "end", "start_method"]

GRACE = 10.0
"""Seconds that a process has to end, before it is killed."""
PATIENCE = 300.0
"""Seconds that importing the libraries may take."""

LIBRARIES = (
    f"{__package__}.hidden",
    f"{__package__}.train",
    "peft",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama",
    "transformers.models.qwen2",
)
"""What one process imports, from which all others are forked: on slow cores that takes a quarter of a minute."""


def start_method(libraries: Sequence[str] = LIBRARIES) -> Any:
    """The context whose processes can use CUDA: forked ones, or where importing the libraries has initialised CUDA, new
    ones, which import by themselves; a line says so.

    Args:
        libraries: modules to import before forking; those that cannot be imported are left to each process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(libraries))
    with environment(PYTHONPATH=os.pathsep.join(filter(None, sys.path)), PYTORCH_NVML_BASED_CUDA_CHECK="1"):
        forkserver.ensure_running()
    reason = reason_against(context)
    if reason is None:
        return context
    print(f"each process imports the libraries by itself, since none can be forked: {reason}", flush=True)
    return multiprocessing.get_context("spawn")


def reason_against(context: Any) -> str | None:
    """Why processes that are forked cannot be used; None where they can."""
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=tell, args=(there,), daemon=True)
    try:
        process.start()
    except (EOFError, OSError) as error:  # Modules that are not there are left to each process.
        here.close()
        there.close()
        return f"the process that imports the libraries before has ended ({type(error).__name__}; its error is above)"
    there.close()
    try:
        return here.recv() if here.poll(PATIENCE) else f"the first one has said nothing for {PATIENCE:.0f} seconds"
    except EOFError:
        return f"the first one ended with status {end(process)}"
    finally:
        end(process)


def end(process: Any, seconds: float = GRACE) -> int | None:
    """Wait for a process that has nothing more to do, and kill it where it does not end.

    Returns:
        Its exit status; None where it was killed here.
    """
    process.join(seconds)
    status = process.exitcode
    if status is None:
        process.kill()
        process.join(seconds)
    return status


def tell(connection: Connection) -> None:
    """In a forked process: why PyTorch would refuse CUDA to it, or None where it would not."""
    torch = sys.modules.get("torch")
    asked = getattr(torch and torch.cuda, "_is_in_bad_fork", None)
    if torch is None:
        connection.send(None)
    elif asked is None:
        connection.send("this release of PyTorch does not say whether it would refuse CUDA to them")
    else:
        connection.send("importing the libraries before has initialised CUDA" if asked() else None)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """These variables for the processes that are started inside.

    The fork server does not take `sys.path` from the one that starts it, before Python 3.13; `is_available` of torch
    initialises CUDA where it is not told to ask the driver's management library.
    """
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
