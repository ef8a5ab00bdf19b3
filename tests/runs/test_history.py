"""The history: what is written is read, and a resumed run continues it without a step lost or twice."""

import copy
import errno
import json
import os
import pickle
import shutil
import warnings

import pytest

from ist.runs import history as history_module
from ist.runs.history import HISTORY_FILE, MAX_WAITING_BYTES, History, read_history


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
        history.write("step", step=2)  # without a line of the run there is nothing to say
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


class FullDisk:
    """A disk without room: writing to files opened for appending fails while `full`, and the tries are counted."""

    def __init__(self, monkeypatch):
        self.full, self.tries, self.sizes = True, 0, []
        write = os.write

        def limited(descriptor, data):
            self.tries += 1
            self.sizes.append(len(data))
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", limited)


def test_a_disk_that_stays_full_costs_each_line_the_same(tmp_path, monkeypatch):
    history = History(tmp_path / HISTORY_FILE)
    disk = FullDisk(monkeypatch)
    with pytest.warns(UserWarning, match=r"cannot be written \(No space left.*4 MiB of them at most"):
        history.write("step", step=1, active=[0])
    for step in range(2, 500):
        history.write("step", step=step, active=[0])
    assert disk.tries == 499  # one try a line, of one line
    assert max(disk.sizes) < 60
    disk.full = False
    history.write("step", step=500, active=[0])
    assert [event["step"] for event in read_history(tmp_path)] == list(range(1, 501))


def test_waiting_lines_are_bounded_and_the_gap_is_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(history_module, "MAX_WAITING_BYTES", 1000)
    history = History(tmp_path / HISTORY_FILE)
    history.write("run", step=0, layers=["a"])
    disk = FullDisk(monkeypatch)
    with pytest.warns(UserWarning, match="training continues"):
        history.write("step", step=1, active=[0])
    for step in range(2, 1001):
        history.write("step", step=step, active=[0])
    assert sum(map(len, history._waiting)) <= 1000
    disk.full = False
    history.write("step", step=1001, active=[0])
    history.write("step", step=1002, active=[0])
    first, *kept, gap, last, after = read_history(tmp_path)
    assert first["event"] == "run"
    assert [event["step"] for event in kept] == list(range(1, len(kept) + 1))
    assert gap == {"event": "gap", "num_lines": 1000 - len(kept)}
    assert (last["step"], after["step"]) == (1001, 1002)


def test_the_bound_is_reached_by_no_short_outage():
    line = '{"event": "step", "step": 20000, "active": [0, 1, 2, 3, 4, 5, 6, 7]}\n'
    assert 20_000 * len(line) <= MAX_WAITING_BYTES


@pytest.mark.parametrize("gone", ["file", "folder"])
def test_what_is_deleted_during_the_run_begins_anew_with_the_line_that_names_the_layers(tmp_path, gone):
    folder = tmp_path / "run"
    history = History(folder / HISTORY_FILE)
    history.write("run", step=0, layers=["a", "b"])
    history.write("step", step=1, active=[0])
    for step in (2, 4):
        if gone == "file":
            history.path.unlink()
        else:
            shutil.rmtree(folder)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            history.write("step", step=step, active=[0])
            history.write("step", step=step + 1, active=[0])
        assert [str(warning.message) for warning in said] == (
            [f"The history {history.path} was deleted during the run: it is begun anew."] if step == 2 else []
        )
        run, *steps = read_history(folder)
        assert run == {"event": "run", "step": 0, "layers": ["a", "b"]}
        assert [event["step"] for event in steps] == [step, step + 1]


STEP = '{"event": "step", "step": 1, "active": [0]}\n'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (STEP.encode("utf-16"), "line 1 is not UTF-8"),
        (STEP.encode("utf-16-le"), "line 1 is not JSON"),
        (b"\x1f\x8b\x08\x00 zipped", "line 1 is not UTF-8"),
        (b"notes of mine", "line 1 is not JSON"),
        (b'{"event": "step", "step": 1\n', "line 1 is not JSON"),
        (b'{"event": "log", "step": 1, "loss": NaN}\n', r"line 1 is not JSON \(NaN is not a number of JSON\)"),
        (b'{"event": "log", "step": 1, "loss": 1e999}\n', r"line 1 is not an event.*'loss' is inf"),
        (b'{"event": "log", "step": 1, "loss": "low"}\n', "'loss' is 'low'"),
        (b'{"event": "step", "step": 1' + b"0" * 9000 + b"}\n", "line 1 is not JSON"),
        (b'{"event": "step", "step": 1' + b"0" * 40 + b"}\n", "'step' is int"),
        (b'{"event": "step", "step": "1"}\n', "'step' is '1'"),
        (b'{"event": "step", "step": -1}\n', "'step' is -1"),
        (b'{"event": "step", "step": 1, "active": "0"}\n', "'active' is '0'"),
        (b'{"event": "step", "step": 1, "active": [0.5]}\n', "'active' is list"),
        (b'{"event": "importance", "step": 1, "importance": {"0": 1}}\n', "'importance' is dict"),
        (b'{"event": "importance", "step": 1, "losses": ["a"]}\n', "'losses' is list"),
        (b'{"event": "importance", "step": 1, "candidates": [0]}\n', "'candidates' is list"),
        (b'{"event": "run", "step": 0, "layers": 4}\n', "'layers' is 4"),
        (b'{"event": "run", "step": 0, "config": []}\n', "'config' is list"),
        (b'{"event": {"a": 1}}\n', "it has no name under 'event'"),
        (b"[1, 2]\n", "it has no name under 'event'"),
        (b"null\n", "it has no name under 'event'"),
        (b"[" * 100_000 + b"\n", "line 1 is not JSON"),
    ],
    ids=range(23),
)
def test_what_is_no_history_is_named_and_left_as_it_is(tmp_path, content, said):
    file = tmp_path / HISTORY_FILE
    file.write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        read_history(tmp_path)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=said + r".*Move it elsewhere, and the resumed run begins another\."):
        History(file, resume_step=3)
    assert file.read_bytes() == content


def test_a_byte_order_mark_and_blank_lines_are_read(tmp_path):
    (tmp_path / HISTORY_FILE).write_bytes(b"\xef\xbb\xbf" + STEP.replace("\n", "\r\n").encode() + b"\r\n")
    assert read_history(tmp_path) == [json.loads(STEP)]


def test_a_resume_names_a_history_that_is_empty(tmp_path):
    file = tmp_path / HISTORY_FILE
    file.touch()
    with pytest.warns(UserWarning, match="is empty, though the run resumes at step 5") as said:
        history = History(file, resume_step=5)
    assert str(file) in str(said[0].message)
    history.write("step", step=6)
    assert read_history(file) == [{"event": "step", "step": 6}]
