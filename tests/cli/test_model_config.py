"""A model's config.json that no model can have: one line before anything is made, and no word where it is odd alone."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    Mamba2Config,
    PreTrainedConfig,
    Zamba2Config,
)

from ist.cli import loading, model_sizes
from ist.cli.loading import load_causal_model, load_tokenizer
from ist.cli.main import main
from ist.cli.model_config import check_config
from ist.cli.model_sizes import Held, files_hold

NAN, INF = float("nan"), float("inf")
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, intermediate_size=48),
    "tied": LlamaConfig(**SIZES, intermediate_size=48, tie_word_embeddings=True),
    "granite": GraniteConfig(**SIZES, intermediate_size=48),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32),
    "gptj": GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, rotary_dim=8),
    "mamba2": Mamba2Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, n_groups=1),
    "shared": Zamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=2,
        mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=4, intermediate_size=48, adapter_rank=4,
        layers_block_type=["mamba", "hybrid"] * 3, num_mem_blocks=1,
    ),
}  # fmt: skip


def saved(kind: str, folder: Path, **options: Any) -> Path:
    """A model's folder."""
    AutoModelForCausalLM.from_config(KINDS[kind]).save_pretrained(folder, **options)
    return folder


def change(model: Path, settings: Mapping[str, Any]) -> None:
    """Put settings into a config.json; an object gets some more."""
    file = model / "config.json"
    config = json.loads(file.read_text())
    merged = {**config, **settings}
    for name, value in settings.items():
        if isinstance(value, dict) and isinstance(config.get(name), dict):
            merged[name] = {**config[name], **value}
    file.write_text(json.dumps(merged))


@pytest.fixture
def nothing_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model is made")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", made)


# ---- Numbers

BROKEN = [
    ("llama", {"rms_norm_eps": NAN}, "rms_norm_eps to nan"),
    ("llama", {"rms_norm_eps": {"__float__": "NaN"}}, "rms_norm_eps to nan"),  # as transformers 5 saves it
    ("llama", {"rms_norm_eps": 1e300}, "rms_norm_eps to 1e+300"),
    ("llama", {"rope_theta": INF}, "rope_theta to inf"),
    ("llama", {"rope_parameters": {"rope_theta": NAN}}, "rope_parameters.rope_theta to nan"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": -INF}}, "rope_scaling.factor to -inf"),
    ("llama", {"initializer_range": NAN}, "initializer_range to nan"),
    ("llama", {"attention_dropout": INF}, "attention_dropout to inf"),
    ("gpt2", {"layer_norm_epsilon": NAN}, "layer_norm_epsilon to nan"),
    ("mamba2", {"time_step_limit": [0.0, NAN]}, "time_step_limit to nan"),
    ("mamba2", {"time_step_floor": INF}, "time_step_floor to inf"),
    *(
        ("granite", {name: value}, f"{name} to {value}")
        for name in ("attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling")
        for value in (NAN, INF)
    ),
]


@pytest.mark.parametrize(("kind", "settings", "said"), BROKEN)
def test_a_number_that_no_layer_can_compute_with(
    kind: str, settings: dict[str, Any], said: str, tmp_path: Path, nothing_made: None
) -> None:
    model = saved(kind, tmp_path)
    change(model, settings)
    with pytest.raises(ValueError, match="which no layer can compute with: give a finite number") as error:
        load_causal_model(str(model))
    assert str(error.value).startswith(f"The config.json of {model} sets {said}, ")
    with pytest.raises(ValueError, match="which no layer can compute with"):  # It comes first in `ist eval`.
        load_tokenizer(str(model))


def test_a_broken_number_ends_every_command_before_anything_loads(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    change(model, {"rms_norm_eps": NAN})
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n' * 8)
    for command in (("train", "--use_cpu", "--bf16=false", "--max_steps=1"), ("eval", "--protocol=loss")):
        capsys.readouterr()
        given = ("--model_name_or_path", str(model), "--data_files", str(rows), "--output_dir", str(tmp_path / "out"))
        assert main([*command, *given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"The config.json of {model} sets rms_norm_eps to nan, which" in line


def test_a_broken_number_of_the_command_line_is_named_as_that(tmp_path: Path, nothing_made: None) -> None:
    with pytest.raises(ValueError, match="--model_init_kwargs sets rms_norm_eps to nan, which no layer can"):
        load_causal_model(str(saved("llama", tmp_path)), rms_norm_eps=NAN)


FINE = [
    ("mamba2", {}),  # Its time_step_limit ends at infinity.
    ("mamba2", {"time_step_limit": [0.0, INF]}),
    ("llama", {"best_loss": NAN, "history": {"loss": [INF]}}),  # No setting of a Llama.
    ("llama", {"layer_norm_epsilon": NAN}),
    ("llama", {"quantization_config": {"quant_method": "bitsandbytes", "llm_int8_threshold": INF}}),
]


@pytest.mark.parametrize(("kind", "settings"), FINE)
def test_an_infinite_number_that_is_none_of_a_layers(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    change(model, settings)
    check_config(str(model), {})


# ---- Sizes

HUGE = [
    ("llama", {"num_hidden_layers": 10**6}, "sets num_hidden_layers to 1000000, and the files of its weights hold"),
    ("llama", {"num_hidden_layers": 10**12}, "sets num_hidden_layers to 1000000000000, and"),
    ("llama", {"num_hidden_layers": 10**4}, "of more than 30000 tensors and modules (num_hidden_layers=10000), and"),
    ("llama", {"num_labels": 10**10}, "sets num_labels to 10000000000, and"),
    ("llama", {"hidden_size": 10**9}, " parameters (model.embed_tokens.weight is 64 × 1000000000), and"),
    ("llama", {"vocab_size": 10**12}, "parameters (model.embed_tokens.weight is 1000000000000 × 32), and the files"),
    ("tied", {"vocab_size": 10**12}, "describes a model of 3.2e+13 parameters (model.embed_tokens.weight is"),
    ("llama", {"intermediate_size": 10**9}, "mlp.gate_proj.weight is 1000000000 × 32), and the files"),
    ("gpt2", {"n_layer": 10**6}, "sets n_layer to 1000000, and"),
    ("gpt2", {"n_positions": 10**9}, "(transformer.wpe.weight is 1000000000 × 32), and the files"),
    ("gptj", {"n_positions": 10**9}, "embed_positions is 1000000000 × 8), which no machine should hold: "),
    ("mamba2", {"state_size": 10**9}, "parameters (backbone.layers.0.mixer.in_proj.weight is "),
]


@pytest.mark.parametrize(("kind", "settings", "said"), HUGE)
@pytest.mark.parametrize("given", [False, True])
def test_a_size_that_the_weights_cannot_have(
    kind: str, settings: dict[str, Any], said: str, given: bool, tmp_path: Path, nothing_made: None
) -> None:
    model = saved(kind, tmp_path)
    (name,) = settings
    if not given:
        change(model, settings)
    with pytest.raises(ValueError, match=r"give the config\.json that belongs to its weights\.$") as error:
        load_causal_model(str(model), **(settings if given else {}))
    where = f", with {name} of --model_init_kwargs," if given and name != "num_labels" else ""
    assert f"The config.json of {model}{where} " in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_is_not_looked_for_by_a_configuration_without_end(tmp_path: Path) -> None:
    model = saved("llama", tmp_path)
    change(model, {"num_labels": 10**10})
    with pytest.raises(ValueError, match="sets num_labels to 10000000000, and the files of its weights hold at most"):
        load_tokenizer(str(model))


def test_a_model_whose_files_are_not_here_has_an_upper_bound(tmp_path: Path) -> None:
    for settings in ({"num_hidden_layers": 10**6}, {"hidden_size": 10**12}):
        KINDS["llama"].save_pretrained(tmp_path)
        change(tmp_path, settings)
        with pytest.raises(ValueError, match=r"and no machine holds that: give the config\.json"):
            check_config(str(tmp_path), {})
    KINDS["llama"].save_pretrained(tmp_path)
    change(tmp_path, {"hidden_size": 2**17, "num_hidden_layers": 30, "intermediate_size": 2**19})
    check_config(str(tmp_path), {})


@pytest.fixture
def no_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    """No size is free, so that small models are judged as large ones are."""
    for name in ("LEAST_NUMBERS", "LEAST_PARTS", "LEAST_BUFFERS"):
        monkeypatch.setattr(model_sizes, name, 0)


def as_bin(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def as_quantised(model: Path) -> None:
    """Every matrix as 4-bit codes in int32, without their values, which nothing looks at here."""
    header, end = {}, 0
    for name, weight in load_file(model / "model.safetensors").items():
        size = weight.numel() // 2 if weight.dim() > 1 else weight.numel() * 4
        kind = "I32" if weight.dim() > 1 else "F32"
        header[name] = {"dtype": kind, "shape": [size // 4], "data_offsets": [end, end + size]}
        end += size
    written = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(written)) + written + bytes(end))
    change(model, {"quantization_config": {"quant_method": "gptq", "bits": 4}})


@pytest.mark.parametrize("kind", [*KINDS])
def test_a_model_whose_files_fit_is_not_refused(kind: str, tmp_path: Path, no_slack: None) -> None:
    check_config(str(saved(kind, tmp_path)), {})


@pytest.mark.parametrize("store", [as_bin, as_quantised, lambda model: saved("llama", model, max_shard_size="5KB")])
def test_files_of_every_kind_are_counted(store: Any, tmp_path: Path, no_slack: None) -> None:
    store(saved("llama", tmp_path))
    check_config(str(tmp_path), {})
    change(tmp_path, {"hidden_size": 10**5})
    with pytest.raises(ValueError, match=r"describes a model of .* parameters .*: give the config\.json"):
        check_config(str(tmp_path), {})


def test_what_the_files_hold(tmp_path: Path) -> None:
    model = saved("llama", tmp_path)
    weights = load_file(model / "model.safetensors")
    read, _ = PreTrainedConfig.get_config_dict(str(model))
    assert files_hold(str(model), {}, read) == Held(sum(map(torch.numel, weights.values())), len(weights))
    size = (model / "model.safetensors").stat().st_size
    by_size = Held(8 * size, size // 64)
    for header in (b"{", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "data_offsets": [0]}}', b"\xff"):
        content = struct.pack("<Q", len(header)) + header
        (model / "model.safetensors").write_bytes(content + bytes(size - len(content)))
        assert files_hold(str(model), {}, read) == by_size
    absurd = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**30]}}).encode()
    content = struct.pack("<Q", len(absurd)) + absurd
    (model / "model.safetensors").write_bytes(content + bytes(size - len(content)))
    assert files_hold(str(model), {}, read) == Held(8 * size, 1)
    (model / "model.safetensors").unlink()
    assert files_hold(str(model), {}, read) is None
    assert files_hold("owner/name", {}, read) is None
