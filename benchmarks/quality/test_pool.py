"""Real processes: how they begin, and what becomes of trainings whose process dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

BENCHMARKS = Path(__file__).parents[1]
PATH = [*sys.path]
sys.path.insert(0, str(BENCHMARKS))

from quality import plan, pool, session, tasks  # noqa: E402
from quality.forking import LIBRARIES, end, start_method  # noqa: E402

sys.path[:] = PATH  # as other tests expect it

SETTING = {"steps": 2, "batch_size": 2, "validation_rows": 2, "test_rows": 2, "rank": 2, "points": 0, "train_rows": 8}
PLAN: dict[str, Any] = {
    "tasks": {"mawps": {}},
    "methods": {"LoRA": {"selector": "all"}},
    "rates": [1e-3],
    "seeds": [0, 1, 2],
    "training": SETTING,
}
ASKED = """
import sys, torch
sys.path.append(sys.argv.pop(1))
asked = []
torch.cuda._is_compiled = lambda: True
torch._C._cuda_getDeviceCount = lambda: 1
torch._C._cuda_getCurrentRawStream = lambda device: 0
torch.cuda._lazy_init = lambda: asked.append(1) or sys.exit("CUDA is initialised")
for name in sys.argv[1:]:
    __import__(name)
print("asked" if asked else "not asked", "bitsandbytes.nn" in sys.modules)
"""
"""Imports modules as where there is a GPU, and says whether one of them initialises CUDA."""
STARTED = f"""
import sys
sys.path.append({str(BENCHMARKS)!r})
from quality.forking import start_method

def tell(connection):
    connection.send("quality.plan" in loaded)

loaded = set(sys.modules)
if __name__ == "__main__":
    context = start_method(sys.argv[1:])
    here, there = context.Pipe()
    process = context.Process(target=tell, args=(there,))
    process.start()
    print(context.get_start_method(), here.recv())
"""
POISON = """
import os, torch
os.register_at_fork(after_in_child=lambda: setattr(torch.cuda, "_is_in_bad_fork", lambda: True))
"""
"""As PyTorch marks the children of a process that has asked for its GPUs."""


@pytest.fixture(scope="module")
def home(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> pool.Home:
    folder = tmp_path_factory.mktemp("pool")
    (folder / "math" / "mawps").mkdir(parents=True)
    for first, name in enumerate(("trainset", "validset", "test")):
        rows = [{"original_text": f"Ann had {100 * first + n} nuts .", "ans": 2.0 * n} for n in range(12)]
        (folder / "math" / "mawps" / f"{name}.json").write_text(json.dumps(rows))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    file = tasks.prepare("mawps", folder, tokenizer, {**plan.TRAINING, **SETTING}, folder)
    return pool.Home(str(tiny_model_folder), "tiny", {"mawps": str(file)}, "cpu", "abc", 1)


def python(script: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    file = folder / "script.py"
    file.write_text(script)
    command = [sys.executable, str(file), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize(
    ("modules", "fault"), [(LIBRARIES, ""), (["bitsandbytes"], "asked")], ids=["libraries", "bitsandbytes"]
)
def test_libraries_to_fork_from_do_not_initialise_cuda(modules: list[str], fault: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    done = python(ASKED, tmp_path, str(BENCHMARKS), *modules)
    assert ("CUDA is initialised" in done.stderr) == bool(fault), done.stderr
    assert fault or done.stdout.splitlines()[-1] == "not asked False"


@pytest.mark.parametrize(
    ("libraries", "started", "reason"),
    [
        (("quality.plan",), "forkserver True", ""),
        (("quality.plan", "poison"), "spawn False", "importing the libraries before has initialised CUDA"),
        (("quality.plan", "deadly"), "spawn False", "the first one ended with status 3"),
        (("no_such_module", "quality.plan"), "forkserver True", ""),
        (("broken", "quality.plan"), "spawn False", "the process that imports the libraries before has ended"),
        (("quality.plan", "silent"), "spawn False", "this release of PyTorch does not say whether"),
    ],
)
def test_processes_are_forked_where_they_can_be(
    libraries: tuple[str, ...], started: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "poison.py").write_text(POISON)
    (tmp_path / "deadly.py").write_text("import os\nos.register_at_fork(after_in_child=lambda: os._exit(3))\n")
    (tmp_path / "broken.py").write_text("raise RuntimeError('no driver')\n")
    (tmp_path / "silent.py").write_text("import torch\ndel torch.cuda._is_in_bad_fork\n")
    done = python(STARTED, tmp_path, *libraries)
    *said, last = done.stdout.splitlines()
    assert last == started, done.stderr
    assert len(said) == bool(reason)
    assert all(reason in line for line in said)


class Killing(pool.Pool):
    """A pool whose first process is killed in the middle of its first training, and whose second one is killed when it
    has nothing to do.
    """

    def __init__(self, home: pool.Home) -> None:
        super().__init__(1, home)
        self.pids: list[int] = []

    def start(self, training: pool.Training) -> None:
        if len(self.pids) == 2:
            self.kill(self._idle[0][0])
        super().start(training)
        ((process, *_),) = self._busy.values()
        self.pids.append(process.pid)
        if len(self.pids) == 1:
            self.kill(process)

    def kill(self, process: Any) -> None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()


def test_what_a_killed_process_trained_is_trained_again(
    home: pool.Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])  # which the processes inherit
    out = tmp_path / "out.jsonl"
    killing = Killing(home)
    lines: dict[str, Any] = {}
    try:
        wanted = {**PLAN, "rates": [1e-3, 2e-3]}
        session.Session([wanted], killing, lines, out, {}, 200, 200, time.monotonic()).run()
    finally:
        killing.close()
    assert len({*killing.pids}) == 3, "a new process after each that was killed"
    written = [json.loads(text) for text in out.read_text().splitlines()]
    assert [line["id"] for line in written] == [*lines]
    assert len(written) == 4
    assert not any("error" in line for line in written)
    assert {line["model"] for line in written} == {"tiny"}
    assert capsys.readouterr().out.count("its process was killed: put back\n") == 1, "there is no process less than one"


class Dying(pool.Pool):
    """A pool whose processes end by themselves, with a status."""

    status = 7

    def _launch(self) -> Any:
        self._context = self._context or start_method(())
        here, there = self._context.Pipe()
        process = self._context.Process(target=os._exit, args=(self.status,))
        process.start()
        there.close()
        return process, here, self._places.pop(0)


def test_a_process_that_ends_by_itself_is_a_failed_training(home: pool.Home) -> None:
    dying = Dying(1, home)
    (training, *_) = plan.expand(PLAN, {}, {}).trainings
    dying.start(training)
    (line,) = dying.collect(200)
    dying.close()
    assert line["error"] == "the process ended with status 7"
    assert dying.num_free == 1


def test_a_process_that_hangs_when_it_ends_is_killed() -> None:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(10_000,), daemon=True)
    process.start()
    assert end(process, 0.1) is None
    assert process.exitcode == -signal.SIGKILL


def test_a_pool_whose_processes_cannot_be_forked_trains(home: pool.Home, tmp_path: Path) -> None:
    (tmp_path / "poison.py").write_text(POISON)
    training = plan.expand(PLAN, {}, {}).trainings[0]
    script = f"""
import sys
sys.path.append({str(BENCHMARKS)!r})
from quality.pool import Home, Pool

if __name__ == "__main__":
    pool = Pool(1, Home({home.model!r}, "tiny", {home.prepared!r}, "cpu", "abc", 1), ["poison"])
    pool.start({training!r})
    (line,) = pool.collect(200)
    pool.close()
    print(line.get("error"), line["curve"])
"""
    done = python(script, tmp_path)
    said, last = done.stdout.splitlines()
    assert said.startswith("each process imports the libraries by itself, since none can be forked: importing"), done
    assert last.startswith("None [[2, ")
