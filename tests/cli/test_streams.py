"""A reader that went away and a log on a full disk end no work."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from ist.cli import main as command_line
from ist.cli.console import PlainConsole
from ist.cli.main import main
from ist.cli.streams import steady_streams

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no device that is always full")


def closed_pipe() -> io.TextIOWrapper:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def full_disk() -> io.TextIOWrapper:
    return FULL.open("w")


STREAMS = [closed_pipe, pytest.param(full_disk, marks=needs_full)]


@pytest.mark.parametrize("make", STREAMS)
@pytest.mark.parametrize("names", [["stdout"], ["stderr"], ["stdout", "stderr"]], ids=str)
def test_a_command_goes_on(make: Any, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def work(arguments: Any) -> None:
        for _ in range(3):
            print("a line", flush=True)
            print("x" * 100_000)
            print("to stderr", file=sys.stderr, flush=True)
            PlainConsole().print("of the display")
            logging.getLogger("ist.cli").warning("of the log")
        done.append(True)

    monkeypatch.setitem(command_line.COMMANDS, "train", work)
    streams = [make() for _ in names]
    for name, stream in zip(names, streams, strict=True):
        monkeypatch.setattr(sys, name, stream)
    assert main(["train"]) == 0
    assert done
    for stream in streams:
        stream.close()  # Nothing is left in its buffer that would fail now.


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_locale_without_some_signs_ends_nothing(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frames of tables, names in other scripts, and halves of characters."""
    done = []

    def work(arguments: Any) -> None:
        table = Table("before", "after")
        table.add_row("1", "größer 日本")
        with PlainConsole(force_terminal=True).status("waiting"):
            PlainConsole().print(table)
        print("a\ud83d │", flush=True)
        print("│", file=sys.stderr)
        done.append(True)

    monkeypatch.setitem(command_line.COMMANDS, "train", work)
    kept = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, held in kept.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(held, encoding=encoding))
    assert main(["train"]) == 0
    assert done
    sys.stdout.flush()
    assert b"a? " in kept["stdout"].getvalue()
    assert b"before" in kept["stdout"].getvalue()


@pytest.mark.parametrize("make", STREAMS)
def test_an_error_keeps_its_status(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", make())
    assert main(["tune"]) == 2
    sys.stderr.close()


def test_streams_are_put_back_and_what_works_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    former = sys.stdout, sys.stderr
    with steady_streams():
        print("a")
        print("b", file=sys.stderr)
        assert sys.stdout.encoding == former[0].encoding
    assert (sys.stdout, sys.stderr) == former
    assert capsys.readouterr() == ("a\n", "b\n")


def test_no_stream_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """`>&-` gives Python none."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["recipes"]) == 0


def test_a_stream_that_was_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with steady_streams():
        sys.stdout.close()


def test_a_training_whose_reader_went_away_is_finished(tiny_model_folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "ist", "train", "--model_name_or_path", str(tiny_model_folder), "--task=word-problems",
        "--num_train_problems=8", "--num_test_problems=2", "--max_steps=3", "--logging_steps=1", "--use_cpu",
        "--output_dir", str(tmp_path / "run"), "--save_strategy=no",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith("ist: ")
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0, error
    assert "Traceback" not in error
    assert "Exception ignored" not in error
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "ist_result.json").is_file()
