"""The instruction format, and what is said of files that are not in it."""

import json
import math

import pytest

from ist.experiments.data.instructions import instruction_prompt, read_instructions

INTRODUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Add 1 and 2."}, f"{INTRODUCTION}\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n"),
        (
            {"instruction": "Add.", "input": ""},
            f"{INTRODUCTION}\n\n### Instruction:\nAdd.\n\n### Response:\n",
        ),
        (
            {"instruction": "Add.", "input": None},
            f"{INTRODUCTION}\n\n### Instruction:\nAdd.\n\n### Response:\n",
        ),
        (
            {"instruction": "Add.", "input": "1 and 2", "output": "3", "answer": "3"},
            f"{WITH_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n",
        ),
        (
            {"instruction": "{a}\n%s ### Input:", "input": "größer"},
            f"{WITH_INPUT}\n\n### Instruction:\n{{a}}\n%s ### Input:\n\n### Input:\ngrößer\n\n### Response:\n",
        ),
    ],
)
def test_the_prompt(row, prompt):
    assert instruction_prompt(row) == prompt


ROWS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say größer.", "input": "", "output": "größer"},
    {"instruction": "Count.", "output": 3, "answer": "ignored"},
]
EXPECTED = [
    {"prompt": instruction_prompt(row), "completion": completion}
    for row, completion in zip(ROWS, ("3", "größer", "3"), strict=True)
]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("kind", ["json", "indented json", "jsonl", "jsonl of another system"])
def test_json_and_json_lines_are_read(tmp_path, kind, ascii_only):
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in ROWS]
    name, text = {
        "json": ("rows.json", f"[{', '.join(lines)}]"),
        "indented json": ("rows.json", json.dumps(ROWS, indent=2, ensure_ascii=ascii_only)),
        "jsonl": ("rows.jsonl", "\n".join(lines)),
        "jsonl of another system": ("rows.jsonl", "\r\n\r\n".join(lines) + "\r\n"),
    }[kind]
    file = tmp_path / name
    file.write_bytes(text.encode())
    assert read_instructions([file]) == EXPECTED
    assert read_instructions([str(file)]) == EXPECTED


def test_files_are_joined_in_the_order_given(tmp_path):
    first, second = tmp_path / "1.json", tmp_path / "2.jsonl"
    first.write_text(json.dumps(ROWS[:2]), encoding="utf-8")
    second.write_text(json.dumps(ROWS[2]), encoding="utf-8")
    assert read_instructions([second, first]) == [EXPECTED[2], *EXPECTED[:2]]
    assert read_instructions([]) == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("rows.json", "", "is not JSON"),
        ("rows.json", "[{]", r"is not JSON \(.* in line 1\): give a list of objects"),
        ("rows.json", '[\n{"instruction": "a",\n}]', r"is not JSON \(.* in line 3\)"),
        ("rows.json", '{"instruction": "a", "output": "b"}\n{bad', r"is not JSON \(.* in line 2\)"),
        ("rows.jsonl", "instruction,output\na,b\n", r"is not JSON .*one object a line \(\.jsonl\)"),
        ("rows.json", "[]", "holds no rows: give a list of objects"),
        ("rows.json", '{"instruction": "a", "output": "b"}', "is an object, not a list: give a list of objects"),
        ("rows.jsonl", "\n\n", "holds no rows: give a list of objects"),
        ("rows.json", '[{"instruction": "a"}]', r"row \d lacks output \(it has instruction\): rows need"),
        ("rows.json", '[{"output": "a", "input": "b"}]', r"lacks instruction \(it has output, input\)"),
        ("rows.jsonl", '{"question": "a", "answer": "b"}', r"lacks instruction and output \(it has question, answer\)"),
        ("rows.json", '["text"]', "row 1 is a str: rows are objects"),
        ("rows.json", '[{"instruction": "a", "output": "b"}, 3]', "row 2 is a int: rows are objects"),
    ],
)
def test_a_file_that_is_not_instructions_is_refused(tmp_path, name, text, said):
    good, bad = tmp_path / "good.json", tmp_path / name
    good.write_text(json.dumps(ROWS), encoding="utf-8")
    bad.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said) as error:
        read_instructions([good, bad])
    assert str(error.value).startswith(str(bad))
    assert "\n" not in str(error.value)


def test_the_row_that_lacks_a_field_is_named(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([*ROWS, {"instruction": "a"}]), encoding="utf-8")
    with pytest.raises(ValueError, match="row 4 lacks output"):
        read_instructions([file])


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file .*: give a list of objects \(\.json\)") as error:
        read_instructions([tmp_path / "rows.json"])
    assert str(tmp_path / "rows.json") in str(error.value)


def test_the_line_that_is_not_json_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(ROWS[0])}\n\n{json.dumps(ROWS[1])}\n{{bad\n", encoding="utf-8")
    with pytest.raises(ValueError, match="in line 4"):
        read_instructions([file])


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85"])
def test_signs_that_end_a_line_only_in_unicode_stay_in_json_lines(tmp_path, sign):
    file = tmp_path / "rows.jsonl"
    row = {"instruction": f"one{sign}two", "output": "b"}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_instructions([file]) == [{"prompt": instruction_prompt(row), "completion": "b"}]


def test_blank_lines_are_passed_over(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(ROWS[0])}\n  \n", encoding="utf-8")
    assert read_instructions([file]) == EXPECTED[:1]


@pytest.mark.parametrize("field", ["instruction", "output"])
def test_null_is_no_text(tmp_path, field):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"instruction": "a", "output": "b", field: None}]), encoding="utf-8")
    with pytest.raises(ValueError, match=field):
        read_instructions([file])


def test_a_file_of_another_encoding_is_named(tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes('[{"instruction": "größer", "output": "b"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows\.json"):
        read_instructions([file])


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("instruction,input,output\nAdd.,1 and 2,3\n", [("Add.", "1 and 2", "3")]),
        ('instruction,output\n"Say ""a, b"".\nTwice.",ab\n', [('Say "a, b".\nTwice.', "", "ab")]),
        ("\ufeffoutput,instruction\r\nb,a\r\n", [("a", "", "b")]),
    ],
)
def test_tables_are_read(tmp_path, text, rows):
    file = tmp_path / "rows.csv"
    file.write_text(text, encoding="utf-8", newline="")
    expected = [{"instruction": i, "input": extra, "output": o} for i, extra, o in rows]
    assert read_instructions([file]) == [
        {"prompt": instruction_prompt(row), "completion": row["output"]} for row in expected
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("instruction,output\na\n", r"is not a table \(line 2 has not as many cells as the first\)"),
        ("instruction,output\na,b,c\n", "line 2 has not as many cells"),
        ('instruction,output\n"a,b\n', "is not a table"),
        ("instruction,output\n", "holds no rows"),
        ("question,answer\na,b\n", "row 1 lacks instruction and output"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, text, said):
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said) as error:
        read_instructions([tmp_path / "rows.csv"])
    assert "\n" not in str(error.value)


ASKS = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1 and 2?"}]
SAYS = {"role": "assistant", "content": "3"}


@pytest.mark.parametrize("before", [ASKS, ASKS[1:], [*ASKS, SAYS, {"role": "user", "content": "Sure?"}]])
def test_a_chat_is_split_before_its_last_answer(tmp_path, before):
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": [*before, {**SAYS, "name": "bot"}], "id": 7}), encoding="utf-8")
    assert read_instructions([file]) == [{"prompt": before, "completion": [SAYS]}]


@pytest.mark.parametrize(
    "messages",
    [[], [SAYS], ASKS, "hello", [*ASKS, {"role": "assistant"}], [*ASKS, {**SAYS, "content": None}], [1, SAYS]],
)
def test_a_chat_without_an_answer_is_refused(tmp_path, messages):
    (tmp_path / "chats.json").write_text(json.dumps([{"messages": messages}]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"chats\.json, row 1 is no chat to learn from"):
        read_instructions([tmp_path / "chats.json"])


def test_prompts_and_completions_are_taken_as_they_are(tmp_path):
    (tmp_path / "rows.json").write_text('[{"prompt": "a", "completion": "b", "more": 1}]', encoding="utf-8")
    assert read_instructions([tmp_path / "rows.json"]) == [{"prompt": "a", "completion": "b"}]


def test_chats_among_other_rows_are_refused(tmp_path):
    (tmp_path / "chats.json").write_text(json.dumps([{"messages": [*ASKS, SAYS]}]), encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    with pytest.raises(ValueError, match="hold chats and other rows"):
        read_instructions([tmp_path / "chats.json", tmp_path / "rows.json"])


def test_the_unusable_file_is_called_so(tmp_path, caplog):
    for name in ("math_data.json", "math_10k.json"):
        (tmp_path / name).write_text(json.dumps(ROWS), encoding="utf-8")
    assert read_instructions([tmp_path / "math_10k.json"]) == EXPECTED
    assert not caplog.records
    assert read_instructions([tmp_path / "math_data.json"]) == EXPECTED
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "contains most of the collection's test items" in caplog.text


STRUCTURED = {"name": "Ann", "known": True, "age": None}


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"instruction": "a", "output": STRUCTURED}, "a", '{"name": "Ann", "known": true, "age": null}'),
        ({"instruction": "a", "output": ["größer", 1.5]}, "a", '["größer", 1.5]'),
        ({"instruction": "a", "output": True}, "a", "true"),
        ({"instruction": "a", "output": 3.5}, "a", "3.5"),
        ({"instruction": ["a", None], "output": "b"}, '["a", null]', "b"),
        ({"instruction": "a", "input": math.nan, "output": "b", "system": math.nan}, "a", "b"),
        ({"instruction": "a", "output": "b", "system": "", "history": []}, "a", "b"),
    ],
)
def test_values_become_texts_as_json_writes_them(tmp_path, row, prompt, completion):
    (tmp_path / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    expected = {"prompt": instruction_prompt({"instruction": prompt}), "completion": completion}
    assert read_instructions([tmp_path / "rows.json"]) == [expected]


def test_a_structured_input_is_json(tmp_path):
    row = {"instruction": "a", "input": STRUCTURED, "output": "b"}
    (tmp_path / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    (read,) = read_instructions([tmp_path / "rows.json"])
    assert '### Input:\n{"name": "Ann", "known": true, "age": null}\n\n' in read["prompt"]


def test_a_context_that_stands_in_the_text_is_not_lost(tmp_path):
    rows = [
        {"prompt": "Ann is 7. How old is she?", "completion": "7", "context": "Ann is 7."},
        {"instruction": "How old?", "input": "Ann is 7.", "output": "7", "context": " Ann is 7. "},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    assert [row["completion"] for row in read_instructions([tmp_path / "rows.json"])] == ["7", "7"]


def test_a_structured_completion_is_json(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "a", "completion": {"b": [1, None]}}]), encoding="utf-8")
    assert read_instructions([tmp_path / "rows.json"]) == [{"prompt": "a", "completion": '{"b": [1, null]}'}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "a", "output": None}, r"lacks output \(it has instruction, output, which is null\)"),
        ({"instruction": "a", "output": math.nan}, r"lacks output \(it has instruction, output, which is NaN\)"),
        ({"prompt": "a", "completion": None}, "lacks instruction and output .*completion, which is null"),
        ({"instruction": "a", "output": [math.nan]}, "has a field, output, that has a number in it that is not finite"),
        ({"instruction": "a", "output": math.inf}, "has a field, output, that has a number in it that is not finite"),
        (
            {"instruction": "a", "output": "b \ud83d"},
            r"field, output, that has a lone surrogate \(\\ud83d at character 3\)",
        ),
        ({"instruction": "a\udc00", "output": "b"}, "field, instruction, that has a lone surrogate"),
        ({"instruction": "a", "input": ["\udc00"], "output": "b"}, "field, input, that has a lone surrogate"),
        ({"prompt": "\ud83d", "completion": "b"}, "field, prompt, that has a lone surrogate"),
        (
            {"instruction": "a", "output": "b", "system": "Be short."},
            "has system, for which the format of instructions",
        ),
        ({"instruction": "a", "output": "b", "history": [["a", "b"]]}, "has history, for which the format"),
        ({"instruction": "a", "output": "b", "context": "c"}, "has context, for which the format"),
        (
            {"prompt": "a", "completion": "b", "system_prompt": "c"},
            "has system_prompt, for which the format of prompts",
        ),
        ({"instruction": "a", "output": "b", "tools": [{}]}, "has tools, which the training would lose"),
    ],
)
def test_a_value_that_is_no_text_is_named_with_its_row(tmp_path, row, said):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([ROWS[0], row]), encoding="utf-8")
    with pytest.raises(ValueError, match=said) as error:
        read_instructions([file])
    assert str(error.value).startswith(f"{file}, row 2 ")
    assert "\n" not in str(error.value)
    str(error.value).encode()


def test_empty_answers_are_left_out_and_counted(tmp_path, caplog):
    file, empty = tmp_path / "rows.json", tmp_path / "empty.json"
    nothing = {"instruction": "a", "output": " \n"}
    chats = [{"messages": [*ASKS, {**SAYS, "content": ""}]}, {"messages": [*ASKS, SAYS]}]
    file.write_text(json.dumps([ROWS[0], nothing, ROWS[1], nothing]), encoding="utf-8")
    assert read_instructions([file]) == EXPECTED[:2]
    assert f"2 of 4 rows of {file} have an empty answer (row 2 is the first), and are left out" in caplog.text
    file.write_text(json.dumps(chats), encoding="utf-8")
    assert read_instructions([file]) == [{"prompt": ASKS, "completion": [SAYS]}]
    empty.write_text(json.dumps([nothing]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"empty\.json has an empty answer in every row"):
        read_instructions([file, empty])
