"""The history: what is written is read, and a resumed run continues it without a step lost or twice."""

import copy
import json
import os
import pickle

import pytest

from ist.runs.history import HISTORY_FILE, History, read_history


def write_steps(history: History, first: int, last: int) -> None:
    """Steps as a run writes them, with an importance update and a log every second step."""
    for step in range(first, last + 1):
        history.write("step", step=step, active=[step % 4, 4])
        if step % 2 == 0:
            history.write("importance", step=step, candidates=[[0, 1], [2, 3]], losses=[0.5, 1 / 3], skipped=None)
            history.write("log", step=step, loss=1 / step)


def test_what_was_written_is_read(tmp_path):
    file = tmp_path / "new" / "folder" / HISTORY_FILE
    history = History(file)
    assert read_history(file) == []
    lines = [
        ("run", {"step": 0, "layers": ["model.layers.0", "größer"], "config": {"beta": 0.25, "policy": None}}),
        ("step", {"step": 1, "active": [0, 3]}),
        ("importance", {"step": 1, "losses": [0.1, 1e-300, 1 / 3], "skipped": "a reason\nof two lines"}),
    ]
    for event, fields in lines:
        history.write(event, **fields)
    expected = [{"event": event, **fields} for event, fields in lines]
    assert read_history(file) == expected
    assert read_history(str(file.parent)) == expected
    assert len(file.read_text(encoding="utf-8").splitlines()) == len(lines)


def test_tuples_become_lists(tmp_path):
    history = History(tmp_path / HISTORY_FILE)
    history.write("importance", step=1, candidates=((0, 1), (2,)))
    assert read_history(tmp_path) == [{"event": "importance", "step": 1, "candidates": [[0, 1], [2]]}]


def test_each_line_is_in_the_file_at_once(tmp_path):
    history = History(tmp_path / HISTORY_FILE)
    for step in (1, 2):
        history.write("step", step=step)
        assert [event["step"] for event in read_history(tmp_path)] == list(range(1, step + 1))


def test_a_new_run_starts_a_new_file(tmp_path):
    write_steps(History(tmp_path / HISTORY_FILE), 1, 3)
    History(tmp_path / HISTORY_FILE)
    assert read_history(tmp_path) == []


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "last line cut"])
@pytest.mark.parametrize("resume_step", [0, 3, 4, 9])
def test_a_resumed_run_writes_what_an_uninterrupted_one_writes(tmp_path, resume_step, cut):
    whole, file = History(tmp_path / "whole" / HISTORY_FILE), tmp_path / "resumed" / HISTORY_FILE
    for history in (whole, History(file)):
        history.write("run", step=0, layers=["a"])
        write_steps(history, 1, 9)
    if cut:  # the killed run was past the checkpoint, in the middle of a line
        with file.open("a", encoding="utf-8") as handle:
            handle.write('{"event": "step", "step": 10, "act')
    resumed = History(file, resume_step=resume_step)
    assert max(event["step"] for event in read_history(file)) == resume_step
    write_steps(resumed, resume_step + 1, 12)
    write_steps(whole, 10, 12)
    events = read_history(file)
    assert events == read_history(whole.path)
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 13))
    assert list(file.parent.iterdir()) == [file]


def test_a_file_that_is_gone_is_begun_anew(tmp_path):
    first = History(tmp_path / HISTORY_FILE)
    for history in (first, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        history.write("step", step=1)
        history.path.unlink()
        history.write("step", step=2)
        history.write("step", step=3)
        assert [event["step"] for event in read_history(history.path)] == [2, 3]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's list of open files")
def test_no_file_stays_open(tmp_path):
    history = History(tmp_path / HISTORY_FILE)
    history.write("step", step=1)
    (number,) = [fd for fd in os.listdir("/proc/self/fd") if link(fd) == str(history.path)]
    del history
    assert link(number) != str(tmp_path / HISTORY_FILE)


def link(number: str) -> str | None:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return None


def test_resuming_where_no_history_is_begins_one(tmp_path):
    history = History(tmp_path / "moved" / HISTORY_FILE, resume_step=5)
    history.write("step", step=6)
    assert read_history(history.path) == [{"event": "step", "step": 6}]


@pytest.mark.parametrize("length", [1, 10, 27])
def test_a_last_line_that_was_cut_is_left_out(tmp_path, length):
    file = tmp_path / HISTORY_FILE
    line = json.dumps({"event": "step", "step": 1}) + "\n"
    assert length < len(line) - 1
    file.write_text(line + line[:length], encoding="utf-8")
    assert read_history(file) == [{"event": "step", "step": 1}]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    file = tmp_path / HISTORY_FILE
    text = '{"event": "step", "step": 1}\n{"event": "st\n{"event": "step", "step": 3}\n'
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2 is not JSON.*the file is damaged") as error:
        read_history(file)
    assert str(file) in str(error.value)
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        History(file, resume_step=3)
    assert file.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", ["", HISTORY_FILE, "other.jsonl"])
def test_a_missing_history_is_an_error(tmp_path, name):
    with pytest.raises(ValueError, match="does not exist: give the folder of a run") as error:
        read_history(tmp_path / name)
    assert str(tmp_path / (name or HISTORY_FILE)) in str(error.value)


@pytest.mark.parametrize("resume_step", [None, 3])
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, resume_step):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    path = tmp_path / "file" / "run" / HISTORY_FILE
    with pytest.raises(ValueError, match=r"Cannot write the history to .*: give a file that can be") as error:
        History(path, resume_step=resume_step)
    assert str(path) in str(error.value)
    assert isinstance(error.value.__cause__, OSError)


@pytest.mark.parametrize("resume_step", [None, 3])
def test_a_folder_in_the_place_of_the_file_is_an_error(tmp_path, resume_step):
    (tmp_path / HISTORY_FILE).mkdir()
    with pytest.raises(ValueError, match=HISTORY_FILE):
        History(tmp_path / HISTORY_FILE, resume_step=resume_step)
