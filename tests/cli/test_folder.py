"""One run in one folder at a time, and a second run without `--output_dir` gets a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import ist.cli.train.command as command
from ist.cli.main import main
from ist.cli.train.arguments import RunArguments, parse_arguments
from ist.cli.train.folder import find_checkpoint, numbered, run_folder
from ist.cli.train.lock import LOCK_FILE, FolderLock
from ist.runtime.distributed import Ranks

RUN = ["--model_name_or_path=x", "--task=word-problems", "--bf16=false", "--use_cpu"]
POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parse(*flags: str) -> RunArguments:
    return parse_arguments([*RUN, *flags])


def leave_run(folder: str, *checkpoints: int) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for step in checkpoints:
        (Path(folder) / f"checkpoint-{step}").mkdir()
    if not checkpoints:
        (Path(folder) / "ist_result.json").write_text("{}")


# ---- Numbered folders

# fmt: off
CHOICES: list[tuple[dict[str, list[int]], list[str], str]] = [
    ({}, [], "runs/ist"),
    ({"runs/ist": []}, [], "runs/ist-2"),
    ({"runs/ist": [3]}, [], "runs/ist-2"),
    ({"runs/ist": [], "runs/ist-2": [5], "runs/ist-10": []}, [], "runs/ist-11"),
    ({"runs/ist": [], "runs/ist-x": [], "runs/ist-02x": [], "runs/other-7": []}, [], "runs/ist-2"),
    ({"runs/ist-4": []}, [], "runs/ist-5"),
    ({"runs/ist": [3], "runs/ist-2": [5]}, ["--resume_from_checkpoint=last"], "runs/ist-2"),
    ({"runs/ist": [3], "runs/ist-2": [5]}, ["--resume_from_checkpoint=auto"], "runs/ist-2"),
    ({}, ["--resume_from_checkpoint=auto"], "runs/ist"),
    ({"runs/ist": [3], "runs/ist-2": [5]}, ["--resume_from_checkpoint=runs/ist/checkpoint-3"], "runs/ist"),
    ({"runs/ist": [3], "else": [5]}, ["--resume_from_checkpoint=else/checkpoint-5"], "runs/ist-2"),
    ({"runs/ist": [3]}, ["--overwrite"], "runs/ist"),
    ({"mine": [3], "mine-2": []}, ["--output_dir=mine", "--resume_from_checkpoint=last"], "mine"),
    ({"mine": [3]}, ["--output_dir=mine/", "--overwrite"], "mine"),
]
# fmt: on


@pytest.mark.parametrize(("runs", "flags", "folder"), CHOICES, ids=[f"{list(r)} {f}" for r, f, _ in CHOICES])
def test_the_folder_of_a_run(runs: dict[str, list[int]], flags: list[str], folder: str) -> None:
    for name, steps in runs.items():
        leave_run(name, *steps)
    run = parse(*flags)
    with run_folder(run, Ranks()) as found:
        assert str(found) == folder
        assert run.training.output_dir == folder
        assert found.is_dir()


def test_a_folder_that_was_named_is_not_numbered() -> None:
    leave_run("mine", 3)
    message = "mine holds another run: resume it by --resume_from_checkpoint last, give another --output_dir"
    with pytest.raises(ValueError, match=message), run_folder(parse("--output_dir=mine"), Ranks()):
        pass
    assert [path.name for path in Path().iterdir()] == ["mine"]


def test_the_name_of_a_recipe_is_numbered_too() -> None:
    Path("mine.yaml").write_text("task: word-problems\nbf16: false\nmodel_name_or_path: x\n")
    leave_run("runs/mine")
    with run_folder(parse_arguments(["--recipe=mine.yaml"]), Ranks()) as folder:
        assert folder == Path("runs/mine-2")


def test_a_trusted_recipe_names_its_folder() -> None:
    Path("mine.yaml").write_text("task: word-problems\nbf16: false\nmodel_name_or_path: x\noutput_dir: there\n")
    leave_run("there")
    run = parse_arguments(["--recipe=mine.yaml", "--trust_recipe"])
    with pytest.raises(ValueError, match="there holds another run"), run_folder(run, Ranks()):
        pass


def test_what_torchrun_may_restart_keeps_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart the number would be another one."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    leave_run("runs/ist")
    with pytest.raises(ValueError, match="runs/ist holds another run"), run_folder(parse(), Ranks()):
        pass


@pytest.mark.parametrize("leave", [False, True])
def test_an_empty_folder_goes_again(leave: bool) -> None:
    with run_folder(parse("--output_dir=a/b/c"), Ranks()) as folder:
        if leave:
            (folder / "file").touch()
    assert [str(path) for path in Path().rglob("*")] == (["a", "a/b", "a/b/c", "a/b/c/file"] if leave else [])


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"], ids=["too long", "zero byte"])
def test_a_name_that_no_folder_can_have_is_refused(name: str) -> None:
    said = r"^The folder .* cannot be written \(.*\): give another one with --output_dir\.$"
    with pytest.raises(ValueError, match=said), run_folder(parse(f"--output_dir={name}"), Ranks()):
        pass
    assert not list(Path().iterdir())


def test_a_folder_that_was_there_stays() -> None:
    Path("a").mkdir()
    with run_folder(parse("--output_dir=a"), Ranks()):
        assert Path("a", LOCK_FILE).exists()
    assert list(Path().rglob("*")) == [Path("a")]


def test_two_commands_get_two_folders(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "train", "--model_name_or_path", str(tiny_model_folder), "--task=word-problems", "--num_train_problems=8",
        "--num_test_problems=0", "--max_steps=1", "--use_cpu", "--save_strategy=steps", "--save_steps=1",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "holds another run" not in capsys.readouterr().out
    assert main(arguments) == 0
    assert "runs/ist holds another run, this one is in runs/ist-2\n" in capsys.readouterr().out
    assert json.loads(Path("runs/ist-2/ist_result.json").read_text())["num_steps"] == 1
    assert main([*arguments, "--resume_from_checkpoint=last"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["ist", "ist-2"]


@pytest.mark.parametrize("saving", [["--save_strategy=no"], ["--save_steps=2", "--save_total_limit=1"]], ids=str)
def test_a_folder_that_is_deleted_in_mid_run_does_not_cost_the_adapter(
    saving: list[str], tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "train", "--model_name_or_path", str(tiny_model_folder), "--task=word-problems", "--num_train_problems=8",
        "--num_test_problems=0", "--max_steps=5", "--update_interval=2", "--use_cpu", "--bf16=false", *saving,
    ]  # fmt: skip
    assert main([*arguments, "--output_dir=whole"]) == 0

    class Delete(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                shutil.rmtree(args.output_dir)

    make_trainer = command.make_trainer

    def with_deletion(*given: Any) -> Any:
        trainer = make_trainer(*given)
        trainer.add_callback(Delete())
        return trainer

    monkeypatch.setattr(command, "make_trainer", with_deletion)
    with pytest.warns(UserWarning, match="was deleted during the run: it is begun anew"):
        assert main([*arguments, "--output_dir=deleted"]) == 0
    file = "adapter_model.safetensors"
    assert Path("deleted", file).read_bytes() == Path("whole", file).read_bytes()
    assert json.loads(Path("deleted/ist_result.json").read_text())["num_steps"] == 5


# ---- The lock


def test_a_folder_in_use_is_refused() -> None:
    Path("mine").mkdir()
    lock = FolderLock(Path("mine"))
    assert lock.take()
    message = rf"^mine is in use by another run \(process {os.getpid()}\): wait for its end, or give another --output_d"
    for flags in (["--overwrite"], ["--resume_from_checkpoint=auto"], []):
        with pytest.raises(ValueError, match=message), run_folder(parse("--output_dir=mine", *flags), Ranks()):
            pass
    lock.release()
    with run_folder(parse("--output_dir=mine"), Ranks()):
        pass


def test_two_runs_at_once_get_two_folders() -> None:
    with run_folder(parse(), Ranks()) as first, run_folder(parse(), Ranks()) as second:
        assert (first, second) == (Path("runs/ist"), Path("runs/ist-2"))


def test_two_quickstarts_at_once_get_two_folders() -> None:
    quickstart = ["--bf16=false", "--use_cpu"]
    first, second = (parse_arguments(quickstart) for _ in range(2))
    with run_folder(first, Ranks()) as one, run_folder(second, Ranks()) as other:
        assert (one, other) == (Path("runs/quickstart"), Path("runs/quickstart-2"))
    assert not Path("runs").exists()


def test_a_lock_is_for_one_and_is_given_back() -> None:
    first, second = FolderLock(Path()), FolderLock(Path())
    assert first.take()
    assert first.take()
    assert not second.take()
    first.release()
    first.release()
    assert second.take()
    second.release()
    assert not Path(LOCK_FILE).exists()


def test_a_lock_on_a_file_that_was_removed_is_none() -> None:
    """The next one would make a new file, and both would hold a lock."""
    first, second = FolderLock(Path()), FolderLock(Path())
    assert first.take()
    Path(LOCK_FILE).unlink()
    assert second.take()
    first.forget()
    assert not FolderLock(Path()).take()
    second.release()


CHILD_OUTLIVES = """
import os, sys
from pathlib import Path
from ist.cli.train.lock import FolderLock
lock = FolderLock(Path("."))
assert lock.take()
running, begun = os.pipe()
if os.fork() == 0:
    os.write(begun, b"!")
    sys.stdin.read()
    os._exit(0)
os.read(running, 1)  # the worker is on its way, and has closed what it does not own
print("ready", flush=True)
os._exit(9)
"""


@pytest.fixture
def orphan() -> Iterator[Any]:
    """A forked worker whose parent took the lock and was killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD_OUTLIVES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.communicate("")


@POSIX
def test_a_worker_does_not_hold_the_lock_of_a_dead_parent(orphan: Any) -> None:
    assert orphan.stdout.readline() == "ready\n"
    assert orphan.wait() == 9
    lock = FolderLock(Path())
    assert lock.take()
    lock.release()


# ---- Several processes


class TwoRanks(Ranks):
    """One of two processes; `other` is what the other one gives to each exchange."""

    def __init__(self, rank: int, other: list[float]) -> None:
        self.rank, self.size, self.other = rank, 2, other

    def mean(self, values: Any) -> list[float]:
        return [(value + self.other.pop(0)) / 2 for value in values]

    def all(self, flag: bool) -> bool:
        return flag and bool(self.other.pop(0))


def test_the_main_process_chooses_for_all() -> None:
    leave_run("runs/ist")
    with run_folder(parse(), TwoRanks(0, [0.0, 1.0])) as folder:
        assert folder == Path("runs/ist-2")
        with run_folder(parse(), TwoRanks(1, [2.0, 1.0])) as other:
            assert other == Path("runs/ist-2")


@pytest.mark.parametrize(
    ("folder", "ranks", "message"),
    [
        ("mine", TwoRanks(0, [0.0]), "mine holds another run"),
        ("mine", TwoRanks(1, [0.0]), "The main process could not take the run's folder"),
        ("new", TwoRanks(0, [0.0, 0.0]), "Another process cannot write into new"),
        ("file/run", TwoRanks(1, [1.0, 1.0]), "file/run cannot be written"),
    ],
)
def test_what_one_process_cannot_have_is_an_error_for_all(folder: str, ranks: Ranks, message: str) -> None:
    leave_run("mine")
    Path("file").touch()
    with pytest.raises(ValueError, match=message), run_folder(parse("--output_dir", folder), ranks):
        pass
    assert sorted(path.name for path in Path().iterdir()) == ["file", "mine"]


def test_numbers() -> None:
    assert [str(numbered(Path("a/b"), number)) for number in (1, 2, 11)] == ["a/b", "a/b-2", "a/b-11"]


# ---- What a run may write over


def test_overwriting_leaves_nothing_of_the_former_run_and_all_else() -> None:
    leave_run("mine", 3)
    written = [
        "adapter_config.json", "adapter_model.safetensors", "model.safetensors", "model-00001-of-00002.safetensors",
        "model.safetensors.index.json", "config.json", "generation_config.json", "ist_history.jsonl", "focus.json",
        "ist_greedy.json", "ist_eval.json", "importance.png", "ist_result.json",
    ]  # fmt: skip
    for name in [*written, "notes.txt", "model.py", "data.json"]:
        Path("mine", name).write_text("{}")
    with run_folder(parse("--output_dir=mine", "--overwrite"), Ranks()) as folder:
        left = sorted(path.name for path in folder.iterdir())
    assert left == sorted([LOCK_FILE, "data.json", "model.py", "notes.txt"])


def test_a_whole_model_over_an_adapter_is_loaded_without_it(tiny_model_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    flags = [
        "train", "--model_name_or_path", str(tiny_model_folder), "--task=word-problems", "--num_train_problems=8",
        "--num_test_problems=0", "--max_steps=2", "--use_cpu", "--save_strategy=no", "--output_dir=mine",
        "--bf16=false",
    ]  # fmt: skip
    assert main([*flags, "--method=ist"]) == 0
    assert main([*flags, "--method=full", "--overwrite"]) == 0
    model = AutoModelForCausalLM.from_pretrained("mine")
    assert not isinstance(model, PeftModel)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    assert not Path("mine", "ist_history.jsonl").exists()


def test_a_checkpoint_from_elsewhere_does_not_write_over_another_run() -> None:
    leave_run("mine")
    leave_run("other", 3)
    run = parse("--output_dir=mine", "--resume_from_checkpoint=other/checkpoint-3")
    with pytest.raises(ValueError, match="mine holds another run: give another --output_dir"), run_folder(run, Ranks()):
        pass
    with run_folder(parse("--output_dir=new", "--resume_from_checkpoint=other/checkpoint-3"), Ranks()) as folder:
        assert folder == Path("new")


@pytest.mark.parametrize(
    "flags",
    [
        ["--model_name_or_path=mine"],
        ["--model_name_or_path=./mine/checkpoint-3", "--overwrite"],
        ["--model_name_or_path=mine", "--overwrite"],
        ["--adapter=mine/adapter_config.json", "--overwrite"],
    ],
)
def test_what_a_run_begins_with_is_not_written_over(flags: list[str]) -> None:
    leave_run("mine", 3)
    Path("mine", "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}')
    arguments = ["--task=word-problems", "--bf16=false", "--use_cpu", "--output_dir=mine", *flags]
    if "--model" not in flags[0]:
        arguments.append("--model_name_or_path=x")
    before = sorted(Path().rglob("*"))
    run = parse_arguments(arguments)
    with (
        pytest.raises(ValueError, match=f"{flags[0].replace('=', ' ')} would be written over"),
        run_folder(run, Ranks()),
    ):
        pass
    assert sorted(Path().rglob("*")) == before


def test_the_folder_of_a_run_is_no_checkpoint() -> None:
    leave_run("mine", 3, 5)
    with pytest.raises(ValueError, match=r"^mine is the folder of a run: give .* such as mine/checkpoint-5\.$"):
        find_checkpoint("mine", Path("new"))
