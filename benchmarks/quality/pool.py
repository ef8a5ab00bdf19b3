"""Processes that train side by side on one device, or on several: each holds the model and does one training a time."""

from __future__ import annotations

import os
import pickle
import platform
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from logging import getLogger
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from commit import versions

from .forking import GRACE, LIBRARIES, end, start_method
from .plan import WHOLE

__all__ = ["KILLED", "Home", "Inline", "Pool"]

KILLED = "the process ended with status -9"
"""The error of a training whose process was killed, which is not the training's own fault."""

Training = Mapping[str, Any]


@dataclass(frozen=True)
class Home:
    """What every process works with."""

    model: str
    """The folder of the model."""
    name: str
    """What the lines call it."""
    prepared: dict[str, str]
    """The file with the tokens, by task."""
    device: str
    """`cuda` or `cpu`."""
    commit: str
    threads: int
    """Of torch, on the CPU, in each process."""
    compiled: bool = False
    """Whether layers are compiled for the steps of methods with adapters."""


class Pool:
    """So many processes. One that failed or died is replaced, since what a failure leaves on a GPU is not known.

    Args:
        num: of processes; they start when they get something to do.
        home: what they work with.
        libraries: what is imported before processes are forked.
    """

    def __init__(self, num: int, home: Home, libraries: Sequence[str] = LIBRARIES) -> None:
        self._home, self._libraries = home, libraries
        self._context: Any = None
        self._idle: list[tuple[Any, Connection, int]] = []
        self._busy: dict[Connection, tuple[Any, int, Training, float]] = {}
        """By the pipe to it, a process, its number, what it trains, and since when."""
        self._device = home.device
        """What the lines call the device."""
        self._compiled: dict[Connection, set[str]] = {}
        """Of each process the kinds of layers that it has compiled, or would have."""
        self._places = list(range(num))
        """Numbers of the processes that are not started."""

    @property
    def running(self) -> list[Training]:
        """What is being trained."""
        return [training for _, _, training, _ in self._busy.values()]

    @property
    def num_free(self) -> int:
        """How many more trainings can be started."""
        return len(self._idle) + len(self._places)

    def start(self, training: Training) -> None:
        """Give a training to a process that has nothing to do: one that has compiled layers for its like, else a new
        one, else any.
        """
        kind = kind_of_layers(training)
        for dead in [other for other in self._idle if other[1].poll()]:  # One that lives says nothing now.
            self._idle.remove(dead)
            self._discard(*dead)
        likes = [
            other
            for other in self._idle
            if not self._home.compiled or kind in WHOLE or kind in self._compiled.get(other[1], ())
        ]
        if likes or not self._places:
            chosen = (likes or self._idle)[-1]
            self._idle.remove(chosen)
            process, connection, place = chosen
        else:
            process, connection, place = self._launch()
        with suppress(OSError):  # It has died: `collect` finds that out.
            connection.send(dict(training))
        self._compiled.setdefault(connection, set()).add(kind)
        self._busy[connection] = (process, place, training, time.perf_counter())

    def collect(self, seconds: float) -> list[dict[str, Any]]:
        """The lines of the trainings that end within these seconds, as soon as there is one."""
        lines = []
        for connection in wait(list(self._busy), timeout=max(0.0, seconds)):
            assert isinstance(connection, Connection)
            process, place, training, begin = self._busy.pop(connection)
            try:
                line = connection.recv()
                self._device = line["device"]
            except (EOFError, OSError):
                status = end(process)
                error = (
                    "the process hung when it ended" if status is None else f"the process ended with status {status}"
                )
                line = {**training, "error": error, "wall_seconds": round(time.perf_counter() - begin, 2)}
                line.update(origin(self._home, self._device))
            if "error" in line:
                self._discard(process, connection, place)
            else:
                self._idle.append((process, connection, place))
            lines.append(line)
        return lines

    def shrink(self) -> None:
        """One process less from now on, of those that are not started."""
        self._places.pop()

    def close(self) -> None:
        """End all processes, also those at work: their trainings leave nothing behind."""
        for process, connection, _ in self._idle:
            connection.close()
            process.join(GRACE)
        for process, *_ in [*self._busy.values(), *self._idle]:
            process.kill()
            process.join(GRACE)
        self._idle, self._busy = [], {}

    def _discard(self, process: Any, connection: Connection, place: int) -> None:
        """End a process that nothing can be given to any more; another takes its place when it is needed."""
        self._compiled.pop(connection, None)
        connection.close()
        end(process)
        self._places.append(place)

    def _launch(self) -> tuple[Any, Connection, int]:
        self._context = self._context or start_method(self._libraries)
        place = self._places.pop(0)
        here, there = self._context.Pipe()
        process = self._context.Process(target=work, args=(there, self._home, place), daemon=True)
        process.start()
        there.close()
        return process, here, place


def kind_of_layers(training: Training) -> str:
    """Trainings with the same word share graphs."""
    selector = training["options"]["selector"]
    return selector if selector in ("all", *WHOLE) else "some"


class Inline:
    """A pool of no process: trains in this one, a training at a time."""

    def __init__(self, home: Home) -> None:
        self._worker = Worker(home)
        self._waiting: list[Training] = []

    @property
    def running(self) -> list[Training]:
        return list(self._waiting)

    @property
    def num_free(self) -> int:
        return 1 - len(self._waiting)

    def start(self, training: Training) -> None:
        self._waiting.append(training)

    def collect(self, seconds: float) -> list[dict[str, Any]]:
        return [self._worker.line(self._waiting.pop())]

    def shrink(self) -> None:
        raise AssertionError("A training with nothing beside it is not put back.")

    def close(self) -> None:
        self._waiting.clear()


def work(connection: Connection, home: Home, place: int) -> None:
    """A process: load the model once, then train what comes until nothing comes or something fails."""
    worker = Worker(home, place)
    while True:
        try:
            training = connection.recv()
        except EOFError:
            return
        line = worker.line(training)
        connection.send(line)
        if "error" in line:
            return


class Worker:
    """Trains in this process, with the model and the tasks that it has loaded."""

    def __init__(self, home: Home, place: int = 0) -> None:
        self._home, self._place = home, place
        self._base: Any = None
        self._tokenizer: Any = None
        self._tasks: dict[str, Any] = {}
        self._device: Any = None

    def line(self, training: Training) -> dict[str, Any]:
        """The training with its result, or with its error: nothing is raised."""
        begin = time.perf_counter()
        line: dict[str, Any] = dict(training)
        try:
            file = self._home.prepared[training["task"]]
            self._load()
            line.update(self._train(training, file))
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:500]
            line["where"] = traceback.format_exc(limit=-3)[-1500:]
        line["wall_seconds"] = round(time.perf_counter() - begin, 2)
        return {**line, **origin(self._home, self._device_name())}

    def _load(self) -> None:
        if self._base is not None:
            return
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        getLogger("ist").setLevel("ERROR")
        logging.disable_progress_bar()
        torch.set_num_threads(self._home.threads)
        number = self._place % max(1, torch.cuda.device_count()) if self._home.device == "cuda" else 0
        self._device = torch.device(f"cuda:{number}" if self._home.device == "cuda" else "cpu")
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            # cuDNN's attention has gradients that are no numbers where a masked batch is 64 tokens long, or 192, and a
            # row of its mask is empty, as those of padding are (https://github.com/pytorch/pytorch/issues/196678).
            torch.backends.cuda.enable_cudnn_sdp(False)
        self._tokenizer = AutoTokenizer.from_pretrained(self._home.model)
        self._base = AutoModelForCausalLM.from_pretrained(self._home.model, dtype=torch.float32)

    def _train(self, training: Training, file: str) -> dict[str, Any]:
        import torch

        from .train import train

        if file not in self._tasks:
            self._tasks[file] = pickle.loads(Path(file).read_bytes())
        task = self._tasks[file]
        try:
            result = train(training, self._base, self._tokenizer, task, self._device, self._home.compiled)
        finally:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        return {**result, "rows": task.counts}

    def _device_name(self) -> str:
        import torch

        gpu = self._device is not None and self._device.type == "cuda"
        return torch.cuda.get_device_name(self._device) if gpu else f"CPU ({platform.machine()})"


def origin(home: Home, device: str) -> dict[str, Any]:
    """Where and when a line came about."""
    return {
        "device": device,
        "versions": versions("torch", "transformers", "peft"),
        "commit": home.commit,
        "model": home.name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host_load": round(os.getloadavg()[0], 1),
    }
