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

__all__ = ["LIBRARIES", "start_method"]

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
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=tell, args=(there,), daemon=True)
    process.start()
    there.close()
    try:
        reason = "importing the libraries before has initialised CUDA" if here.recv() else None
    except EOFError:
        process.join()
        reason = f"the first one ended with status {process.exitcode}"
    process.join()
    if reason is None:
        return context
    print(f"each process imports the libraries by itself, since none can be forked: {reason}", flush=True)
    return multiprocessing.get_context("spawn")


def tell(connection: Connection) -> None:
    """In a forked process: whether PyTorch would refuse CUDA to it."""
    torch = sys.modules.get("torch")
    connection.send(torch is not None and torch.cuda._is_in_bad_fork())


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
