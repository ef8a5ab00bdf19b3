"""The token with which rows end, where it is none of those that end the model's answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ist.cli.main import main
from ist.cli.train.ends import kind_of
from ist.experiments.evaluation.ends import model_ends

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} {% endif %}"
)
TEXT = {"instruction": "a", "output": "b"}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture
def converted(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A model whose answers end with <|im_end|>, and whose tokenizer ends texts with <eos>."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|im_end|>", "<|end|>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(folder)
    return folder


def train(model: Path, row: Any, folder: Path, *flags: str) -> int:
    file = folder / "rows.jsonl"
    file.write_text((json.dumps(row) + "\n") * 8)
    common = ["train", "--model_name_or_path", str(model), "--data_files", str(file), "--use_cpu", "--bf16=false"]
    return main([*common, "--max_steps=1", "--save_strategy=no", "--output_dir", str(folder / "run"), *flags])


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ist.cli.train.ends"]


def saved_ends(folder: Path) -> list[str]:
    ids: Any = GenerationConfig.from_pretrained(folder).eos_token_id
    return AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(ids if isinstance(ids, list) else [ids])


@pytest.mark.parametrize(
    ("row", "flags", "said"),
    [
        (TEXT, (), "Rows end with <eos> (the tokenizer's eos_token), and answers of MODEL with <|im_end|>: "),
        (TEXT, ("--method=focused",), "Rows end with <eos> (the tokenizer's eos_token), and answers of MODEL with "),
        (TEXT, ("--eos_token=<|im_end|>",), ""),
        (TEXT, ("--eos_token=<|im_end|>", "--method=focused"), ""),
        (TEXT, ("--eos_token=<|end|>",), "Rows end with <|end|> (the tokenizer's eos_token), and answers of MODEL "),
        (CHAT, (), "Chats end with <|end|> (of the chat template), and answers of MODEL with <|im_end|>: "),
    ],
)
def test_a_taught_end_that_is_not_the_models_is_said_once(
    converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, row: Any, flags: tuple[str, ...], said: str
) -> None:
    assert train(converted, row, tmp_path, *flags) == 0
    lines = warned(caplog)
    assert len(lines) == bool(said)
    for line in lines:
        assert line.startswith(said.replace("MODEL", str(converted)))
        assert "A saved adapter has no generation_config.json." in line
        way_out = "--eos_token '<|im_end|>'" if row is TEXT else "a --chat_template_path that ends answers with <|im_e"
        assert way_out in line
        assert "\n" not in line


def test_nothing_is_said_of_a_model_that_ends_as_its_tokenizer(
    tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(tiny_model_folder, TEXT, tmp_path) == 0
    assert warned(caplog) == []


@pytest.mark.parametrize(("row", "taught"), [(TEXT, "<eos>"), (CHAT, "<|end|>")])
def test_a_whole_model_is_saved_with_the_taught_end_beside_its_own(
    converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, row: Any, taught: str
) -> None:
    assert train(converted, row, tmp_path, "--method=full") == 0
    assert {taught, "<|im_end|>"} <= set(saved_ends(tmp_path / "run"))
    (line,) = warned(caplog)
    assert "saved adapter" not in line


def test_a_template_without_an_end_teaches_none(
    converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text(TEMPLATE.replace("<|end|>", "; "))
    assert train(converted, CHAT, tmp_path, "--chat_template_path", str(template)) == 0
    (line,) = warned(caplog)
    assert line.startswith("The chat template ends an answer with no token of its own, so that ")


@pytest.mark.parametrize(
    ("eos", "flags", "said"),
    [
        (None, (), "The model's tokenizer has no eos_token, with which rows end: give --eos_token with one of its "),
        (None, ("--eos_token=nothing",), "--eos_token nothing is no token of the tokenizer in MODEL: give one of its "),
        ("<eos>", ("--eos_token=nothing",), "leave it out for the tokenizer's own, now <eos>."),
        (None, ("--eos_token=<|im_end|>",), ""),
    ],
)
def test_rows_need_a_token_to_end_with(
    converted: Path, tmp_path: Path, capsys: Any, eos: str | None, flags: tuple[str, ...], said: str
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(converted)
    tokenizer.eos_token = eos
    tokenizer.save_pretrained(converted)
    capsys.readouterr()
    assert train(converted, TEXT, tmp_path, *flags) == (2 if said else 0)
    if said:
        (line,) = capsys.readouterr().err.splitlines()
        assert said.replace("MODEL", str(converted)) in line
        assert not (tmp_path / "run").exists()


def test_an_adapter_is_evaluated_with_the_tokenizer_that_it_was_trained_with(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base's ends texts with another token, and has another template."""
    from ist.cli.eval.model import load_model

    template = tmp_path / "own.jinja"
    template.write_text(TEMPLATE.replace("<|end|>", "<|im_end|>"))
    flags = ("--eos_token=<|end|>", "--chat_template_path", str(template))
    assert train(converted, CHAT, tmp_path, *flags) == 0
    run = tmp_path / "run"
    given = {"device": "cpu", "trust_remote_code": False, "dtype": "auto", "model_name_or_path": str(converted)}
    _, tokenizer = load_model(SimpleNamespace(**given, adapter=str(run)))  # type: ignore[arg-type]
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.chat_template == template.read_text()
    config = json.loads((run / "tokenizer_config.json").read_text())
    (run / "tokenizer_config.json").write_text(json.dumps({**config, "auto_map": {"AutoTokenizer": ["its.Own", None]}}))
    _, tokenizer = load_model(SimpleNamespace(**given, adapter=str(run)))  # type: ignore[arg-type]
    assert tokenizer.eos_token == "<eos>"  # of the base: code that comes with an adapter does not run


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([{"prompt": "a", "completion": "b"}], "rows"),
        ([{"text": "a"}], "rows"),
        ([CHAT], "chats"),
        ([{"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}], "chats"),
        ([{"conversations": [{"from": "human", "value": "a"}]}], "chats"),
        ([{"input_ids": [1, 2]}], "others"),
        ([], "others"),
    ],
)
def test_what_rows_are(rows: list[Any], kind: str) -> None:
    assert kind_of(rows, "text") == kind


@pytest.mark.parametrize("end", ["x", [1, "x"], 1.5])
def test_an_end_that_is_no_tokens_number_is_named(end: Any) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=end), config=None)
    with pytest.raises(ValueError, match=r"eos_token_id=.* of the model's generation_config\.json or config\.json"):
        model_ends(model)
