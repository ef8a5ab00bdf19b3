"""`ist compare` shows the progress line of `ist train` while a run trains: on a terminal, and in no log."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from ist.cli.compare.command import Comparison
from ist.cli.compare.display import CompareDisplay
from ist.cli.compare.recipe import read_comparison
from ist.cli.console import PlainConsole
from ist.cli.step_lines import STEP_MARK, StepLine, read_step, tell_step
from tests.cli.test_compare import RECIPE

FEW = ["--max_steps=6", "--logging_steps=2", "--eval_strategy=no", "--save_strategy=no"]


def compared(folder: Path, model: Path, terminal: bool) -> str:
    """What a real comparison of one method shows."""
    (folder / "small.yaml").write_text(RECIPE)
    recipe = read_comparison(folder / "small.yaml", ["--model_name_or_path", str(model), *FEW], methods=["IST"])
    comparison = Comparison(recipe, folder / "out")
    shown = io.StringIO()
    comparison.display.console = PlainConsole(file=shown, force_terminal=terminal, width=160, _environ={})
    comparison.run()
    return shown.getvalue()


def test_a_run_shows_its_steps_on_a_terminal(tiny_model_folder: Path, tmp_path: Path) -> None:
    shown = compared(tmp_path, tiny_model_folder, terminal=True)
    assert "IST, seed 1" in shown
    assert "6/6" in shown
    assert any(f"{layers} loss" in shown for layers in ("■···", "·■··", "··■·", "···■"))
    log = (tmp_path / "out" / "IST" / "seed-1" / "train.log").read_text()
    assert "step    6/6" in log
    assert STEP_MARK not in log
    assert "6/6" not in compared(make(tmp_path / "b"), tiny_model_folder, terminal=False)


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_the_line_stands_only_while_steps_are_made() -> None:
    display, shown = CompareDisplay(), io.StringIO()
    display.console = PlainConsole(file=shown, force_terminal=True, width=100, _environ={})
    with display.running("LoRA", 1, None, "steps") as take:
        take("before: validation loss 4.2")
        take(STEP_MARK + '[1, 2, "■·", "1.500"]\n')
        take(STEP_MARK + '[2, 2, "·■", "1.400"]\n')
        take("after: validation loss 1.2")
    assert "2/2" in shown.getvalue()
    assert "after: validation loss 1.2" in shown.getvalue()
    assert shown.getvalue().rfind("2/2") < shown.getvalue().rfind("after:"), "the line has gone"


def test_a_process_tells_only_where_it_is_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = StepLine(3, 10, "■··", "1.234")
    tell_step(line)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("IST_TELL_STEPS", "1")
    tell_step(line)
    assert read_step(capsys.readouterr().out) == line
    assert read_step("step 3/10") is None
    assert read_step(f'{STEP_MARK}[3, 10, "■··",W0101 a warning of another process') is None
