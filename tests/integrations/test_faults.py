"""Faults while training, each a real one: the training, or its last good checkpoint, survives.

| fault | what survives | test |
|---|---|---|
| disk full while the history is written | training; no line is lost once there is space | here |
| disk full while a checkpoint is written | the checkpoint before | here |
| a reporter raises | the last checkpoint; the model is as PEFT made it | here |
| a probe dataset that raises, a probe loader whose workers die, an empty one | training, without updates | here |
| losses that are not finite | training; the update is recorded as skipped | here, test_measurement.py |
| weights that are not finite | the last checkpoint | step/test_finite.py, distributed/test_stops.py |
| out of memory in a probe | training, with the same batches as without | test_measurement.py |
| Ctrl-C, SIGTERM | a checkpoint is written, then out | here |
| SIGKILL at any moment | the last checkpoint, to the bit | distributed/test_kill.py |
| a damaged checkpoint | it is named, the one before is offered | test_checkpoints.py |
"""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback

from ist import IST, History, SparseTuner, last_checkpoint, read_history
from tests.helpers.processes import Forked, run
from tests.helpers.tiny import snapshot, tiny_batches, tiny_lora, tiny_rows, traces, trainable
from tests.helpers.trainers import make_trainer

ON_A_FULL_DISK = """
import json, resource, signal, warnings
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
"""


def run_script(script: str) -> str:
    done = run(ON_A_FULL_DISK + script)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_full_disk_loses_no_line_of_the_history(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    said = run_script(f"""
from ist import History
history = History({str(file)!r})
for step in range(10):
    if step == 3:
        limit(150)
    if step == 7:
        limit(resource.RLIM_INFINITY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history.write("step", step=step, active=[step] * 4)
    print(step, len(caught), open({str(file)!r}).read()[-1:] == chr(10))
""")
    lines = said.splitlines()
    assert sum(int(line.split()[1]) for line in lines) == 1, "one warning"
    assert all(line.endswith("True") for line in lines), "no part of a line is left"
    assert [event["step"] for event in read_history(file)] == list(range(10))


def test_a_full_disk_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    run_script(f"""
from tests.helpers.trainers import make_trainer
from transformers import TrainerCallback

class Fill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            limit(4096)

from ist import IST
trainer = make_trainer(__import__("pathlib").Path({str(tmp_path)!r}), IST(update_interval=2), Fill())
try:
    trainer.train()
except Exception as error:
    print(type(error).__name__)
else:
    raise SystemExit("the disk was not full")
""")
    with pytest.warns(UserWarning, match="checkpoint-6: .*checkpoint-3 is taken"):
        checkpoint = last_checkpoint(tmp_path)
    assert checkpoint == tmp_path / "checkpoint-3"
    trainer = make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert [event["step"] for event in read_history(tmp_path) if event["event"] == "step"] == list(range(1, 10))
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    assert_same(snapshot(trainer.model), snapshot(whole.model))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(a[name], b[name]) for name in a)


class Broken(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise ConnectionError("the reporter's server is gone")


def test_a_reporter_that_raises(tmp_path: Path) -> None:
    model = tiny_lora()
    trainer = make_trainer(tmp_path, IST(update_interval=2), Broken(), model=model, logging_steps=1)
    with pytest.raises(ConnectionError):
        trainer.train()
    after = traces(model)
    assert all(after["requires_grad"][name] for name, p in model.named_parameters() if "lora" in name)
    again = make_trainer(tmp_path, logging_steps=1)
    again.train(resume_from_checkpoint=str(last_checkpoint(tmp_path)))
    whole = make_trainer(tmp_path / "whole", logging_steps=1)
    whole.train()
    assert_same(snapshot(again.model), snapshot(whole.model))


class Rows(Dataset[Any]):
    """Rows that cannot all be read."""

    def __init__(self, error: type[Exception] | None = None, kill: bool = False) -> None:
        self._rows, self._error, self._kill = tiny_rows(16), error, kill

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        if self._error:
            raise self._error("the file is gone")
        if self._kill and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._rows[index]


class Streamed(torch.utils.data.IterableDataset[Any]):
    """A stream whose workers are killed."""

    def __iter__(self) -> Any:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return iter(tiny_rows(16))


PROBES: dict[str, Any] = {
    "a dataset with a file that is gone": lambda: DataLoader(Rows(FileNotFoundError), batch_size=4),
    "a dataset that raises RuntimeError": lambda: DataLoader(Rows(RuntimeError), batch_size=4),
    "killed workers": lambda: DataLoader(Streamed(), batch_size=4, num_workers=1),
    "no batches": lambda: [],
}


@pytest.mark.parametrize("fault", PROBES)
def test_probes_that_cannot_be_read(fault: str) -> None:
    model, plain = tiny_lora(), tiny_lora()
    choices: list[tuple[Any, dict[str, Any]]] = [
        (model, {"probe_batches": PROBES[fault]()}),
        (plain, {"selector": "random"}),
    ]
    for trained, options in choices:
        optimizer = torch.optim.AdamW(trainable(trained), lr=1e-2)
        tuner = SparseTuner(trained, update_interval=2, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in tiny_batches(6):
                tuner.begin_step()
                trained(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                assert tuner.end_step(optimizer) is None
        said = [str(w.message) for w in caught if "probe" in str(w.message)]
        assert len(said) == (1 if trained is model else 0), said
        tuner.close()
    assert_same(snapshot(model), snapshot(plain))


class Poison(TrainerCallback):
    """A frozen weight that is NaN while step 4 is measured: its losses are not finite, and the weights are."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        norm = model.base_model.model.model.norm.weight
        if state.global_step == 3:
            self._weight = norm.detach().clone()
            norm.data.fill_(float("nan"))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 4:
            model.base_model.model.model.norm.weight.data.copy_(self._weight)


def test_losses_that_are_not_finite(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, IST(update_interval=2), Poison())
    with pytest.warns(UserWarning, match="losses not finite"):
        trainer.train()
    updates = {event["step"]: event["skipped"] for event in read_history(tmp_path) if event["event"] == "importance"}
    assert sorted(updates) == [2, 4, 6, 8]
    assert updates[2] is None
    assert updates[4].startswith("losses not finite")
    assert updates[6] is None


@pytest.mark.filterwarnings("ignore:The run began with other arguments:UserWarning")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (getattr(signal, "SIGHUP", 1), 129)]
)
def test_a_signal_writes_a_checkpoint_and_stops(
    number: int, status: int, tiny_model_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    folder = tmp_path / "run"
    flags = [
        "train", "--model_name_or_path", str(tiny_model_folder), "--task=word-problems", "--num_train_problems=64",
        "--num_test_problems=0", "--per_device_train_batch_size=2", "--logging_steps=1", "--save_strategy=no",
        "--use_cpu", "--lora_r=4", "--output_dir", str(folder), "--update_interval=5",
    ]  # fmt: skip
    command = tmp_path / "command.py"
    command.write_text("import sys\nfrom ist.cli.main import main\nsys.exit(main())\n")
    process = Forked(command, *flags, "--max_steps=100000")
    history = folder / "ist_history.jsonl"
    end = time.monotonic() + 90
    while time.monotonic() < end and (not history.exists() or history.read_text().count('"step"') < 10):
        time.sleep(0.05)
    os.kill(process.pid, number)
    ended = process.completed(timeout=60)
    errors = ended.stderr
    assert ended.returncode == status, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("ist train: ")]
    checkpoint = last_checkpoint(folder)
    assert checkpoint
    step = int(checkpoint.name.rpartition("-")[2])
    assert line.startswith(f"ist train: stopped after step {step}; ")
    assert "--resume_from_checkpoint last" in line
    if number == signal.SIGINT:
        from ist.cli.main import main

        assert main([*flags, f"--max_steps={step + 3}", "--resume_from_checkpoint", "last"]) == 0
        assert json.loads((folder / "ist_result.json").read_text())["num_steps"] == step + 3
        steps = [event["step"] for event in read_history(folder) if event["event"] == "step"]
        assert steps == list(range(1, step + 4))


def test_a_closed_terminal_does_not_stop_what_ignores_it() -> None:
    """As nohup has it."""
    pytest.importorskip("trl")
    from ist.cli.train.interrupt import Interrupt

    hangup = signal.SIGHUP
    former = signal.signal(hangup, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), hangup)
            assert signal.getsignal(hangup) == signal.SIG_IGN
        assert interrupt.number is None
        signal.signal(hangup, signal.SIG_DFL)
        with Interrupt() as interrupt:
            os.kill(os.getpid(), hangup)
        assert interrupt.number == hangup
        assert signal.getsignal(hangup) == signal.SIG_DFL
    finally:
        signal.signal(hangup, former)


def test_nothing_to_resume_from_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from ist.cli.train.folder import find_checkpoint

    assert find_checkpoint("auto", tmp_path) is None
    assert find_checkpoint(None, tmp_path) is None
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        find_checkpoint("last", tmp_path)
    with pytest.raises(
        ValueError, match=r"There is no folder .*checkpoint-1: give a checkpoint-N folder, `last` or `auto`"
    ):
        find_checkpoint(str(tmp_path / "checkpoint-1"), tmp_path)


def test_a_history_that_is_written_again_says_nothing_more(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl")
    history.write("step", step=1)
    history.write("step", step=2)
    assert (tmp_path / "h.jsonl").read_text().count("\n") == 2


def test_steps_that_a_scaler_skipped_are_in_a_resumed_history_once(tmp_path: Path) -> None:
    """The Trainer counts them, the tuner does not."""

    class Skipping(torch.optim.AdamW):
        found_inf: torch.Tensor | None = None

        def step(self, closure: Any = None) -> Any:
            return None if self.found_inf is not None else super().step(closure)

    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = kwargs["optimizer"]
            while hasattr(optimizer, "optimizer"):
                optimizer = optimizer.optimizer
            optimizer.found_inf = torch.ones(()) if state.global_step < 3 else None

    def run(resume: str | None = None) -> list[tuple[str, int]]:
        model = tiny_lora()
        trainer = make_trainer(tmp_path, IST(update_interval=2), Overflow(), model=model, logging_steps=1)
        trainer.optimizer = Skipping(trainable(model), lr=1e-2)
        trainer.train(resume_from_checkpoint=resume)
        return [(event["event"], event["step"]) for event in read_history(tmp_path)]

    whole = [event for event in run() if event[0] != "run"]
    assert [step for kind, step in whole if kind == "step"] == list(range(1, 7))
    resumed = [event for event in run(str(tmp_path / "checkpoint-6")) if event[0] != "run"]
    assert sorted(resumed) == sorted(whole)
