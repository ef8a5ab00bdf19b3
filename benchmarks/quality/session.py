"""One call of `run.py`: what is started when, and a line for each training that ends."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .memory import Memory
from .part import Part
from .plan import Expansion, Training, expand
from .pool import KILLED, Inline, Pool

__all__ = ["KINDS", "Plan", "Session", "expand_all", "finite"]

Plan = dict[str, Any]
KINDS = ("importance", "speed", "training")
NO_MEMORY = "OutOfMemoryError"
MOST_KILLED = 3
"""So often a training whose process was killed is tried again in one call."""
ALIKE = 5
"""So many trainings that fail alike, and none that succeeds, end a call: the reason is then not the trainings'."""


def expand_all(
    plans: Sequence[Plan], lines: Mapping[str, Any], num_rows: Mapping[str, int], part: Part | None = None
) -> Expansion:
    """What several plans come to, each training once: the first plan's first; a part of them where one is given."""
    parts = [expand(plan, lines, num_rows) for plan in plans]
    trainings: dict[str, Training] = {}
    for expansion in parts:
        for training in expansion.trainings:
            trainings.setdefault(training["id"], training)
    own = (part or Part()).of(trainings.values(), plans)
    return Expansion(own, [reason for expansion in parts for reason in expansion.waiting])


class Session:
    """One call: starts what can be started, writes a line for each training that ends.

    Args:
        plans: what to train, the first one first.
        pool: where.
        lines: results so far, by id.
        output: the file that takes the new ones.
        num_rows: training rows of each task.
        seconds: after these nothing is started.
        limit: after these what still runs is given up.
        begin: when the call began.
        kinds: of trainings that are run.
        memory: whether another training fits on the device; without it all do.
        part: of the plans' trainings; without it all.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        pool: Pool | Inline,
        lines: dict[str, dict[str, Any]],
        output: Path,
        num_rows: Mapping[str, int],
        seconds: float,
        limit: float,
        begin: float,
        kinds: Sequence[str] = KINDS,
        memory: Memory | None = None,
        part: Part | None = None,
    ) -> None:
        self.plans, self.pool, self.lines, self.output, self.num_rows = plans, pool, lines, output, num_rows
        self.seconds, self.limit, self.begin, self.kinds = seconds, limit, begin, kinds
        self.memory, self.part = memory or Memory(None), part
        self.alone = False
        """Whether what runs must have the device for itself."""
        self.pace: dict[tuple[str, ...], tuple[float, float]] = {}
        """By task, and by task and method, the most seconds a step that a training took in this call, and the most
        beside its steps."""
        self.works = False
        """Whether a training has succeeded."""
        self.num_killed: dict[str, int] = {}
        """How often the process of a training was killed, by its id."""
        self.failed: list[dict[str, Any]] = []
        """Lines of failed trainings, which are not in the file while none has succeeded."""

    def run(self) -> None:
        """Until nothing is left, the time is over, or all that is tried fails alike."""
        try:
            self.train()
        finally:
            self.keep(self.failed)

    def train(self) -> None:
        """Start and collect trainings."""
        while True:
            self.fill()
            if not self.pool.running:
                return
            if self.elapsed >= self.limit:
                print(f"given up, for the next call: {len(self.pool.running)} trainings", flush=True)
                return
            for line in self.pool.collect(min(5.0, self.limit - self.elapsed)):
                self.alone = False
                if not self.put_back(line):
                    self.write(line)
            if len(self.left_alone()) >= ALIKE and not self.works:
                print(
                    f"stopped: the processes of {len(self.left_alone())} trainings were killed again and again and "
                    "none succeeded: free memory of this host, or give fewer --processes, and call again",
                    flush=True,
                )
                return
            if alike := self.failed_alike():
                self.failed = [line for line in self.failed if line not in alike]
                for line in alike:
                    del self.lines[line["id"]]
                print(
                    f"stopped: {len(alike)} trainings failed and none succeeded, with {alike[0]['error']!r}; mend that "
                    "and call again, which tries them again",
                    flush=True,
                )
                return

    def put_back(self, line: Mapping[str, Any]) -> bool:
        """Whether a training failed for a reason that is not its own, so that it is tried again and has no line: for
        want of the device's memory beside others, or since its process was killed, as a host does that has no memory.
        From then on there is one process less.
        """
        error = line.get("error", "")
        if error == KILLED:
            num = self.num_killed[line["id"]] = self.num_killed.get(line["id"], 0) + 1
            said = "its process was killed: "
            said += "put back" if num <= MOST_KILLED else f"{num} times, and is left for the next call"
        elif self.pool.running and error.startswith(NO_MEMORY):
            said = "no memory: put back"
        else:
            return False
        if self.pool.num_free + len(self.pool.running) > 1:
            self.pool.shrink()
            said += ", with one process less"
        print(f"{self.elapsed:5.0f} s  {line['id']}  {said}", flush=True)
        return True

    def left_alone(self) -> set[str]:
        """The ids of trainings whose process was killed too often in this call."""
        return {name for name, num in self.num_killed.items() if num > MOST_KILLED}

    def failed_alike(self) -> list[dict[str, Any]]:
        """The lines of the failures that end the call, of which the trainings are not the reason: too many with one
        error, and not of one method alone where there are others.
        """
        for error in dict.fromkeys(line["error"] for line in self.failed):
            alike = [line for line in self.failed if line["error"] == error]
            if len(alike) < ALIKE:
                continue
            methods = {line["method"] for line in alike}
            others = [*self.failed, *self.pool.running, *self.left()]
            if len(methods) > 1 or all(training["method"] in methods for training in others):
                return alike
        return []

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def left(self) -> list[Training]:
        """What can be started now."""
        running = {training["id"] for training in self.pool.running} | self.left_alone()
        trainings = expand_all(self.plans, self.lines, self.num_rows, self.part).trainings
        left = [t for t in trainings if t["id"] not in self.lines and t["id"] not in running]
        return [t for t in left if t["kind"] in self.kinds]

    def fill(self) -> None:
        """Start trainings: one to be timed where nothing runs, else as many others as there are free processes."""
        if self.elapsed >= self.seconds or self.alone or not self.pool.num_free:
            return
        left = self.left()
        timed = [training for training in left if training["kind"] == "speed"]
        if timed and not self.pool.running:
            self.alone = True
            self.pool.start(timed[0])
            return
        others = [training for training in left if training["kind"] != "speed" and self.fits(training)]
        for training in others[: self.pool.num_free]:
            if not self.memory.fits(training, self.pool.running):
                return  # Until one ends: a smaller one from further down would only put off what matters more.
            self.pool.start(training)

    def fits(self, training: Training) -> bool:
        """Whether a training would end within the limit, as far as this call has seen its task."""
        task, method = training["task"], training["method"]
        step, rest = self.pace.get((task, method), self.pace.get((task,), (0.0, 0.0)))
        return self.elapsed + step * training["steps"] + rest <= self.limit

    def write(self, line: dict[str, Any]) -> None:
        """Keep a line, and say so."""
        line["beside"] = 0 if line["kind"] == "speed" else len(self.pool.running)
        self.lines[line["id"]] = line
        self.memory.note(line)
        if line["kind"] == "training" and "error" not in line:
            own = line["train_seconds"]
            for key in ((line["task"],), (line["task"], line["method"])):
                step, rest = self.pace.get(key, (0.0, 0.0))
                self.pace[key] = max(step, own / line["steps"]), max(rest, line["wall_seconds"] - own)
        if "error" in line and not self.works:
            self.failed.append(line)
        else:
            self.works = True
            self.keep([*self.failed, line])
            self.failed = []
        said = line.get("error") or {name: show(part) for name, part in line.get("test", {}).items()} or "done"
        print(f"{self.elapsed:5.0f} s  {line['id']}  {line['wall_seconds']:.0f} s  {said}", flush=True)

    def keep(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write lines to the file."""
        if lines:
            with self.output.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(finite(line), allow_nan=False) + "\n" for line in lines)


def finite(value: Any) -> Any:
    """Plain values; NaN and infinity, which JSON lacks, become None."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(part: Mapping[str, float]) -> str:
    return f"{part['accuracy']:.3f}" if "accuracy" in part else f"loss {part['loss']:.4f}"
