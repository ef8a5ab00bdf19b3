"""The README keeps its promises: its program runs as it stands, and its links work outside of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ist import read_history
from ist.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HERE = "/ist-peft/ist-peft/"
MAX_LINES = 180


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")  # it runs as a user runs it
def test_the_program_runs_as_it_stands(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the model is another, since no test needs the network."""
    (program,) = blocks("python")
    assert program.count(MODEL) == 1
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    torch.manual_seed(0)
    exec(compile(program.replace(MODEL, str(tiny_model_folder)), "README.md", "exec"), names)  # noqa: S102

    events = read_history(tmp_path / "runs" / "sums")
    assert [len(event["active"]) for event in events if event["event"] == "step"] == [1] * 100  # of four layers
    assert len([event for event in events if event["event"] == "importance"]) == 10
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, tmp_path / "runs" / "sums" / "adapter").eval()(ids).logits
    assert not torch.allclose(before, after, atol=1e-3)


def test_every_command_exists() -> None:
    commands = {line.split()[1] for block in blocks("bash") for line in block.splitlines() if line.startswith("ist ")}
    assert commands
    assert commands <= {*COMMANDS}


def test_links_are_absolute_and_those_to_this_repository_exist() -> None:
    """A package index shows the README without the repository."""
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert [link for link in links if not link.startswith("https://")] == []
    ours = [urlparse(link).path.removeprefix(HERE) for link in links if HERE in link]
    assert ours
    for path in ours:
        file = re.sub(r"^(blob/main|tree/main|main)/", "", path)
        assert (ROOT / file).exists(), path


def test_the_method_stands_there_with_its_equations() -> None:
    (method,) = blocks("text")
    assert re.findall(r"\((\d+)\)  ", method) == ["6", "7", "8", "9", "10"]
    assert method.count("\n") == 5


def test_it_is_short() -> None:
    assert README.count("\n") <= MAX_LINES
