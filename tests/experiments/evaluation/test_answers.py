"""Saved answers: what is gone on from, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ist.experiments.evaluation.answers import AnswerFile, claim_folder, claimed, row_id

IDS = [row_id("a"), row_id("b"), row_id("c")]
LINES = [json.dumps({"index": index, "id": IDS[index], "text": "ö"}, ensure_ascii=False) + "\n" for index in range(3)]


def test_answers_are_written_as_they_come_and_read_again(tmp_path: Path) -> None:
    first = AnswerFile(tmp_path / "new" / "task.jsonl", IDS)
    first.add([(2, {"text": "ö"})])
    first.add([(0, {"text": "ö"})])
    assert (tmp_path / "new" / "task.jsonl").read_text(encoding="utf-8") == LINES[2] + LINES[0]
    again = AnswerFile(tmp_path / "new" / "task.jsonl", IDS)
    assert sorted(again.answers) == [0, 2]
    assert again.answers == first.answers


@pytest.mark.parametrize("cut", [1, 10, len(LINES[1]) - 1])
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(LINES[0] + LINES[1][:cut], encoding="utf-8")
    answers = AnswerFile(file, IDS)
    assert list(answers.answers) == [0]
    answers.add([(1, {"text": "ö"})])
    assert file.read_text(encoding="utf-8") == LINES[0] + LINES[1]


def test_rows_beyond_the_limit_are_passed_over_and_stay(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text("".join(LINES), encoding="utf-8")
    assert list(AnswerFile(file, IDS[:2]).answers) == [0, 1]
    assert list(AnswerFile(file, IDS).answers) == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps({"index": 0, "id": IDS[1]}) + "\n", "line 1 answers another row than number 0 of the task's"),
        (LINES[0] + "{}\n", "line 2 is no answer"),
        (LINES[0] + "hello\n", "line 2 is no answer"),
        ("\n", "line 1 is no answer"),
        (json.dumps({"index": -1, "id": IDS[-1]}) + "\n", "line 1 is no answer"),
        (json.dumps({"index": 1e400, "id": IDS[0]}) + "\n", "line 1 is no answer"),
        (json.dumps({"index": 0, "id": IDS[0], "correct": "yes"}) + "\n", "line 1 is no answer"),
        (json.dumps({"index": 0, "id": IDS[0], "loss": None, "tokens": 1}) + "\n", "line 1 is no answer"),
        (json.dumps({"index": 0, "id": IDS[0], "score": math.nan}) + "\n", "line 1 is no answer"),
        (json.dumps({"index": 0, "id": IDS[0], "loss": 1.0, "tokens": 0}) + "\n", "line 1 is no answer"),
        (json.dumps({"index": 0, "id": IDS[0], "loss": 1.0}) + "\n", "line 1 is no answer like those before it"),
        (json.dumps({"index": 0, "id": IDS[0], "correct": True}) + "\n" + LINES[1], "line 2 is no answer like those"),
        ("[" * 100_000 + "\n", "line 1 is no answer"),
    ],
)
def test_other_answers_are_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        AnswerFile(file, IDS)
    assert file.read_text(encoding="utf-8") == text


def test_a_claim_without_an_answer_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "answers"
    for error in (ValueError("a metric"), KeyboardInterrupt()):
        with pytest.raises(type(error)), claimed(folder, {"metric": "one"}):
            raise error
        assert not list(tmp_path.iterdir())
    with claimed(folder, {"metric": "two"}):
        AnswerFile(folder / "task.jsonl", IDS).add([(0, {"text": "a"})])
    assert (folder / "identity.json").exists()
    with pytest.raises(ValueError, match="another evaluation"), claimed(folder, {"metric": "one"}):
        pass
    with pytest.raises(ValueError, match="again"), claimed(folder, {"metric": "two"}):
        raise ValueError("again")
    assert (folder / "identity.json").exists()


def test_a_folder_belongs_to_one_evaluation(tmp_path: Path) -> None:
    identity = {"weights": "1a", "protocol": "loss", "generation": {"num_beams": 1}, "pair": (1, 2)}
    claim_folder(tmp_path / "answers", identity)
    claim_folder(tmp_path / "answers", identity)
    before = (tmp_path / "answers" / "identity.json").read_text()
    with pytest.raises(ValueError, match=r"another evaluation \(weights '1a', now '2b'\): give another folder"):
        claim_folder(tmp_path / "answers", {**identity, "weights": "2b"})
    with pytest.raises(ValueError, match=r"num_beams.*1.*now.*num_beams.*4"):
        claim_folder(tmp_path / "answers", {**identity, "generation": {"num_beams": 4}})
    assert (tmp_path / "answers" / "identity.json").read_text() == before


@pytest.mark.parametrize(
    ("file", "said"), [("task.jsonl", "has answers of unknown origin"), ("identity.json", "is damaged")]
)
def test_a_folder_of_unknown_origin_is_refused(tmp_path: Path, file: str, said: str) -> None:
    for content in ("{", "[]"):
        (tmp_path / file).write_text(content)
        with pytest.raises(ValueError, match=said):
            claim_folder(tmp_path, {"weights": "1a"})
