"""`ist compare` with a metric of the user's choice: in its table, its JSON and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ist.cli.compare import runs
from ist.cli.main import main

ROWS = [{"instruction": f"Say {n}.", "output": ("yes", "no")[n % 2]} for n in range(12)]
RECIPE = """
methods: {a: {method: peft}, b: {method: peft, learning_rate: 1.0e-2}}
against: [a]
seeds: [0, 1]
flags:
  max_steps: 1
  save_strategy: "no"
  use_cpu: true
  bf16: false
  lora_r: 2
  lora_target_modules: [q_proj]
"""


@pytest.fixture
def command(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A comparison whose trainings run in this process."""

    def here(name: str, arguments: list[str], log: Path, on_line: Any) -> None:
        assert main([name, *arguments]) == 0

    monkeypatch.setattr(runs, "run_command", here)
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "metric.py").write_text("def half(response, expected):\n    return len(expected) / 2\n")
    return [
        "compare", "--recipe", str(tmp_path / "small.yaml"), "--output_dir", str(tmp_path / "out"),
        "--model_name_or_path", str(tiny_model_folder), "--data_files", str(tmp_path / "mine.jsonl"),
    ]  # fmt: skip


def test_a_metric_is_in_the_table_the_json_and_a_picture(command: list[str], tmp_path: Path, capsys: Any) -> None:
    metric = ["--metric_function", f"{tmp_path / 'metric.py'}:half", "--max_new_tokens=1", "--validation_size=6"]
    again = [f"data_files={tmp_path / 'mine.jsonl'}", "metric=label_accuracy", "max_new_tokens=1", "limit=2"]
    assert main([*command, *metric, "--evaluation", *again]) == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    for run in found["runs"]:
        assert run["metric"]["rows"] == 6
        assert run["figures"]["half score"] == run["after"]["half score"] == run["metric"]["after"]["score"]
        assert 1 <= run["figures"]["half score"] <= 1.5
        assert run["evaluation"]["tasks"]["mine"]["total"] == 2
    scores = found["table"]["steps"]["half score"]
    assert scores["b"]["differences"]["a"]["mean"] == 0  # the same rows, and the function does not read the answers
    assert list(found["table"]["steps"]) == ["validation loss", "half score", "mine"]
    console = capsys.readouterr().out
    assert "half score, equal steps, 2 seeds" in console
    assert f"half score {scores['a']['values']['0']:.4f}" in console
    assert (tmp_path / "out" / "metrics.png").stat().st_size > 5_000
    assert "metrics.png" in console
    (tmp_path / "metric.py").write_text("def half(response, expected):\n    return 0\n")
    assert main([*command, *metric, "--evaluation", *again]) == 2
    assert f"seed-0 was marked by another version of {tmp_path / 'metric.py'}:half: give" in capsys.readouterr().err


def test_a_function_is_imported_before_anything_is_trained(command: list[str], tmp_path: Path, capsys: Any) -> None:
    for more in (["--metric_function=none.py:f"], ["--evaluation", "data_files=x", "metric_function=none.py:f"]):
        assert main([*command, *more]) == 2
        assert "none.py is not a file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
