"""Each file of `examples` runs as it stands, learns, and leaves a plain PEFT adapter."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from ist import read_history

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
WITH_TRAINER = ("trainer", "sft", "dpo")
LAUNCHED = {
    "ddp": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/ddp.py"],
    "fsdp2": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/fsdp2.py"],
}
pytestmark = pytest.mark.filterwarnings("ignore")  # an example runs as a user runs it


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call `main` of an example, with the options that a command line would have."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name: str, *options: Any) -> Any:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()

    yield run
    sys.modules.pop("starter", None)


def base_model() -> Any:
    return runpy.run_path(str(EXAMPLES / "starter.py"))["load"](None)[0]


def check_adapter(folder: Path) -> None:
    """The adapter loads with PEFT, and changes what the model computes."""
    base = base_model().eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, folder).eval()(ids).logits
    assert not torch.allclose(before, after, atol=1e-3)


def test_every_example_is_tested() -> None:
    files = {file.stem for file in EXAMPLES.glob("*.py")}
    assert files == {"starter", "plain_loop", *WITH_TRAINER, *LAUNCHED}


def test_the_plain_loop_learns(run_example: Any) -> None:
    first, last = run_example("plain_loop")
    assert last < 0.5 * first


@pytest.mark.parametrize("name", WITH_TRAINER)
def test_an_example_with_a_trainer_learns(name: str, run_example: Any, tmp_path: Path) -> None:
    if name != "trainer":
        pytest.importorskip("trl")
    trainer = run_example(name, "--steps", 30, "--output", tmp_path)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] * (0.97 if name == "dpo" else 0.7), losses
    events = read_history(tmp_path)
    assert [len(event["active"]) for event in events if event["event"] == "step"] == [2] * 30
    assert [event["step"] for event in events if event["event"] == "importance"] == [10, 20, 30]
    check_adapter(tmp_path)


@pytest.mark.parametrize("name", ["trainer", "sft"])
def test_the_end_is_learned_where_it_pads_too(name: str, run_example: Any, tmp_path: Path) -> None:
    """A collator that masks padding by its token masks the end with it."""
    if name != "trainer":
        pytest.importorskip("trl")
    trainer = run_example(name, "--steps", 1, "--output", tmp_path)
    tokenizer, collate = trainer.processing_class, trainer.data_collator
    end = 1
    if name == "trainer":
        collate.tokenizer.pad_token = collate.tokenizer.eos_token
    else:
        collate.pad_token_id = tokenizer.eos_token_id
    rows = sorted(({len(row["input_ids"]): row for row in trainer.train_dataset}).items())
    batch = collate([dict(row) for _, row in rows])
    assert len(rows) > 1
    for (length, _), ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        assert ids[length - 1 :].eq(end).all()
        assert labels[length - 1] == end
        assert labels[length:].eq(-100).all()


def launch(command: list[str], folder: Path) -> str:
    finished = subprocess.run(
        [sys.executable, "-m", *command, "--steps", "32", "--output", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


@pytest.mark.distributed
def test_ddp_and_fsdp2_learn_the_same_with_two_processes(tmp_path: Path) -> None:
    adapters = {}
    for name, command in LAUNCHED.items():
        out = launch(command, tmp_path / name)
        first, last = map(float, out.split("loss ")[1].split(" -> "))
        assert last < 0.5 * first
        adapters[name] = load_file(tmp_path / name / "adapter_model.safetensors")
        check_adapter(tmp_path / name)
    assert adapters["ddp"].keys() == adapters["fsdp2"].keys()
    for name, weight in adapters["ddp"].items():
        torch.testing.assert_close(adapters["fsdp2"][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("configuration", ["ddp", "fsdp2"])
def test_the_trainer_example_runs_under_accelerate(configuration: str, tmp_path: Path) -> None:
    yaml = f"examples/distributed/{configuration}.yaml"
    launcher = ["accelerate.commands.launch", "--main_process_port", "0", "--config_file", yaml]
    launch([*launcher, "examples/trainer.py"], tmp_path)
    assert len([event for event in read_history(tmp_path) if event["event"] == "step"]) == 32
    check_adapter(tmp_path)
