"""Files as people have them: byte order marks, compression, lists and lines under either name, tables, parquet."""

from __future__ import annotations

import builtins
import codecs
import csv
import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from ist.experiments.data.files import read_rows, read_text

ROWS = [{"instruction": "Say größer 😀.", "output": "größer"}, {"instruction": "Add.", "output": "3"}]
LIST = json.dumps(ROWS, ensure_ascii=False)
INDENTED = json.dumps(ROWS, ensure_ascii=False, indent=1)
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
TABLE = "instruction,output\nSay größer 😀.,größer\nAdd.,3\n"

READ = [
    (name, text)
    for text, names in {
        LIST: ("rows.json", "rows.jsonl", "rows.JSON", "rows"),
        INDENTED: ("rows.json", "rows.jsonl"),
        LINES: ("rows.jsonl", "rows.ndjson", "rows.json", "rows.v1.JSONL", "rows"),
        TABLE: ("rows.csv", "rows.CSV"),
        TABLE.replace(",", "\t"): ("rows.tsv",),
        TABLE.replace(",", ";"): ("rows.csv",),
    }.items()
    for name in names
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("name", "text"), READ)
def test_rows_are_read_whatever_the_file_is_called(
    tmp_path: Path, name: str, text: str, compressed: bool, encoding: str
) -> None:
    data = text.encode(encoding)
    file = tmp_path / (f"{name}.gz" if compressed else name)
    file.write_bytes(gzip.compress(data) if compressed else data)
    assert read_rows(file) == ROWS


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (" instruction , output \nAdd.,3\n", [{"instruction": "Add.", "output": "3"}]),
        ('instruction, output\n"1, 2", "a ""b"""\n', [{"instruction": "1, 2", "output": 'a "b"'}]),
        ("instruction,output\n Add., 3\n", [{"instruction": " Add.", "output": " 3"}]),
        ("\n\ninstruction,output\n\nAdd.,3\n\n", [{"instruction": "Add.", "output": "3"}]),
        (",instruction,output\n0,Add.,3\n", [{"": "0", "instruction": "Add.", "output": "3"}]),
        ("instruction,output\nAdd.,1;2\n", [{"instruction": "Add.", "output": "1;2"}]),
        (f"instruction,output\nAdd.,{'9' * 200_000}\n", [{"instruction": "Add.", "output": "9" * 200_000}]),
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path: Path, text: str, rows: list[dict[str, str]]) -> None:
    limit = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8")
    assert read_rows(tmp_path / "rows.csv") == rows
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("rows.csv", b"output,instruction, output\na,b,c\n", "two columns are called 'output'"),
        ("rows.jsonl.gz", LINES.encode(), r"is not a whole gzip file \(Not a gzipped file"),
        ("rows.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "is not a whole gzip file"),
        ("rows.jsonl.gz", gzip.compress(b"\n" * (1 << 25), mtime=0), "unpacks to more than 200 times its size"),
        ("rows.json", '[{"instruction": "größer"}]'.encode("latin-1"), r"is not text in UTF-8 \(byte 20\)"),
        ("rows.json", b"\xff\xfe[", "is not text in UTF-8"),
        ("rows.json", b"[" * 100_000, "it nests too deep"),
        ("rows.json", b"[" + b"9" * 5000 + b"]", "is not JSON that can be read"),
        ("rows.json", b'{"a": 1}\n{"a": 2}\n{bad\n', r"is not JSON \(.* in line 3\)"),
        ("rows.jsonl", b'[{"a": 1},\n{bad]', r"is not JSON \(.* in line 2\)"),
        ("rows.json", b'{"instruction": {"0": "a"}}', "is an object, not a list: .* pandas writes one with orient="),
        ("rows.json", b'"text"', "is a str, not a list"),
        ("rows.parquet", b"PAR1", "is not parquet that can be read"),
        ("rows.parquet", b"", "is not parquet that can be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=said) as error:
        read_rows(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_single_line_is_a_row_where_the_name_says_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}')
    assert read_rows(tmp_path / "rows.jsonl") == [{"a": 1}]


def test_a_path_from_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.json").write_text(LIST, encoding="utf-8")
    assert read_rows("~/rows.json") == ROWS


def test_parquet_is_read(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]
    rows = [{"messages": messages, "id": 1}, {"messages": messages[1:], "id": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first, second = read_rows(tmp_path / "rows.parquet")
    assert first["id"] == 1
    assert second == {"messages": [messages[1]], "id": None}
    assert first["messages"][0] == {"role": "user", "content": "q", "weight": None}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"rows\.jsonl is a pipe or a device, and files are read more than once"):
        read_rows(tmp_path / "rows.jsonl")


def test_what_parquet_holds_beside_texts(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    single = pyarrow.array([0.1, None], pyarrow.float32())
    parquet.write_table(pyarrow.table({" instruction": ["a", "b"], "output ": single}), tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet") == [
        {"instruction": "a", "output": 0.1}, {"instruction": "b", "output": None}
    ]  # fmt: skip
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["output", "output "])
    parquet.write_table(twice, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"is not a table \(two columns are called 'output'\): rename one of them"):
        read_rows(tmp_path / "rows.parquet")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_names_are_read_without_spaces_at_their_ends(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('[{" instruction": "a", "output\\t": "b c "}]')
    assert read_rows(tmp_path / name) == [{"instruction": "a", "output": "b c "}]
    (tmp_path / name).write_text('[{"a": 1, "a ": 2}]')
    assert read_rows(tmp_path / name) == [{"a": 1, "a ": 2}]


def test_a_small_parquet_file_that_unpacks_to_much_is_refused(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"instruction": pyarrow.array(["x" * 100_000] * 1000)})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert (tmp_path / "rows.parquet").stat().st_size < 200_000
    with pytest.raises(ValueError, match="unpacks to more than 200 times its size"):
        read_rows(tmp_path / "rows.parquet")


def test_parquet_without_pyarrow_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_pyarrow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ModuleNotFoundError("No module named 'pyarrow'")
        return real(name, *args, **kwargs)

    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ValueError, match=r"rows\.parquet is parquet, which pyarrow reads: pip install pyarrow"):
        read_rows(tmp_path / "rows.parquet")


def test_a_text_loses_its_byte_order_mark_alone(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_bytes(b"\xef\xbb\xbf\xef\xbb\xbfOnce\r\n")
    assert read_text(tmp_path / "story.txt") == "\ufeffOnce\r\n"


def test_what_a_file_holds_counts_and_not_its_name(tmp_path: Path) -> None:
    """Compressed lines without `.gz`, parquet without its suffix, tables with tabs, files joined with their marks."""
    rows = [{"instruction": "a", "output": "b"}] * 2
    line = json.dumps(rows[0]).encode()
    table = tmp_path / "x.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), table)
    contents = {
        "a.jsonl": gzip.compress(line + b"\n" + line),
        "b.jsonl": table.read_bytes(),
        "c.csv": b"instruction\toutput\na\tb\na\tb\n",
        "d.jsonl": codecs.BOM_UTF8 + line + b"\n" + codecs.BOM_UTF8 + line,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert read_rows(tmp_path / name) == rows, name


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04rest", "a zip archive or a spreadsheet"),
        (b"BZh91AY", "compressed by bzip2"),
        (b"\xfd7zXZ\x00", "compressed by xz"),
        (b"\x28\xb5\x2f\xfd00", "compressed by Zstandard"),
        (b"ARROW1\x00", "an Arrow file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS, not the data"),
        (b'{"data": [{"instruction": "a"}], "n": 1}', "an object that holds rows under 'data'"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    for name in ("x.json", "x.csv") if said.startswith("a zip") else ("x.json",):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{name} is {said}")):
            read_rows(tmp_path / name)
