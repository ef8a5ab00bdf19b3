"""Models, tokenizers and adapters whose files are damaged or do not belong together: one line, nothing trained."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ist.cli.failures import describe_missing
from ist.cli.loading import check_tokens, load_adapter, load_causal_model
from ist.cli.main import main
from ist.cli.weights import check_layers, check_weights

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"


def changed(name: str, **fields: Any) -> Callable[[Path], None]:
    """Writes other values into a JSON file of a folder."""

    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


def written(name: str, content: bytes | None) -> Callable[[Path], None]:
    """Replaces a file of a folder, or removes it."""

    def change(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return change


def rewritten(name: str, change_weights: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    """Changes the weights in a file of a folder."""

    def change(folder: Path) -> None:
        save_file(change_weights(load_file(folder / name)), folder / name, metadata={"format": "pt"})

    return change


class Runs:
    """A pickle that runs code when it is read."""

    def __reduce__(self) -> Any:
        return sys.exit, ("the file's code has run",)


RUNS = io.BytesIO()
torch.save(Runs(), RUNS)
RUNS_CODE = "has a file of weights that is damaged, or that runs code when it is read: give one with weights"


def pickled(content: bytes | io.BytesIO) -> Callable[[Path], None]:
    """Puts a pickle in the place of safetensors."""

    def change(folder: Path) -> None:
        for name, other in ((WEIGHTS, "pytorch_model.bin"), (ADAPTER, "adapter_model.bin")):
            if (folder / name).exists():
                (folder / name).unlink()
                (folder / other).write_bytes(content if isinstance(content, bytes) else content.getvalue())

    return change


CONFIG = "config.json"
MODELS = [
    (changed(CONFIG, num_hidden_layers=9), "weights that its config.json describes (model.layers."),
    (rewritten(WEIGHTS, lambda w: {k: v for k, v in w.items() if "down_proj" not in k}), "mlp.down_proj.weight, …)"),
    (changed(CONFIG, vocab_size=9999), "are not of the sizes in its config.json (lm_head.weight is "),
    (changed(CONFIG, num_attention_heads=0), "cannot be loaded (ZeroDivisionError: "),
    (changed(CONFIG, hidden_act="silly"), "cannot be loaded (KeyError: 'silly'): its files are damaged, do not belong"),
    (changed(CONFIG, hidden_size="8"), "'hidden_size': TypeError: "),
    (changed(CONFIG, model_type="t5"), "is no causal language model (its configuration is a T5Config)"),
    (written(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "cannot be loaded (SafetensorError: "),
    (written(WEIGHTS, b""), "cannot be loaded (SafetensorError: "),
    (written("tokenizer.json", b'{"version": "1.0", '), "The tokenizer in "),
    (
        pickled(b"no pickle at all" * 9),
        RUNS_CODE,
    ),
    (
        pickled(RUNS),
        RUNS_CODE,
    ),
]


@pytest.mark.parametrize(("change", "said"), MODELS)
def test_a_model_whose_files_do_not_fit_is_one_line(
    tiny_model_folder: Path, tmp_path: Path, capsys: Any, change: Callable[[Path], None], said: str
) -> None:
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    change(model)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    for command in (["train", "--output_dir", str(tmp_path / "run"), "--use_cpu"], ["eval", "--protocol=loss"]):
        capsys.readouterr()
        assert main([*command, "--model_name_or_path", str(model), "--data_files", str(data)]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert str(model) in error


def test_a_file_is_no_model(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "model.gguf").touch()
    assert main(["train", "--model_name_or_path", str(tmp_path / "model.gguf"), "--task=word-problems"]) == 2
    assert f"{tmp_path / 'model.gguf'} is a file, and a model is a folder" in capsys.readouterr().err


def test_weights_without_a_place_are_said_and_a_tied_head_is_not_missed(
    tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    rewritten(WEIGHTS, lambda w: {**w, "vision.layers.7.weight": torch.ones(2)})(model)
    load_causal_model(str(model))
    assert f"1 weight of {model} are not used (vision.layers.7.weight): the model of its config.json" in caplog.text
    caplog.clear()
    changed(CONFIG, tie_word_embeddings=True)(model)
    rewritten(WEIGHTS, lambda w: {k: v for k, v in w.items() if "lm_head" not in k and "vision" not in k})(model)
    load_causal_model(str(model))
    assert not caplog.text


def test_a_model_with_fewer_layers_than_its_files_is_refused_unless_it_is_asked_for(
    tiny_model_folder: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    made = json.loads((model / CONFIG).read_text())["num_hidden_layers"]
    changed(CONFIG, num_hidden_layers=2)(model)
    said = (
        f"The weights in {model} have {made} layers in model.layers, and its config.json makes 2: give the config.json "
        "that belongs to them. If fewer layers are meant, save the smaller model with save_pretrained and train that.\n"
    )
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    for command in (["train", "--output_dir", str(tmp_path / "run"), "--use_cpu"], ["eval", "--protocol=loss"]):
        capsys.readouterr()
        assert main([*command, "--model_name_or_path", str(model), "--data_files", str(data)]) == 2
        assert capsys.readouterr().err.endswith(said)
    cut = load_causal_model(str(tiny_model_folder), saves=True, num_hidden_layers=2)
    assert len(cut.model.layers) == 2
    assert f"weights of {tiny_model_folder} are not used (model.layers.2." in caplog.text


CUT = "--model_init_kwargs", '{"num_hidden_layers": 2}'


def test_what_the_flags_make_of_a_model_is_not_lost_with_an_adapter(
    tiny_model_folder: Path, adapter: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Every later command would put the adapter on the whole base, without a word."""
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps({"instruction": "a", "output": "b"}) + "\n") * 8)
    train = [
        "train", "--data_files", str(data), "--use_cpu", "--bf16=false", "--max_steps=1", "--num_test_problems=0",
        "--save_strategy=no", "--model_name_or_path",
    ]  # fmt: skip
    for model in (tiny_model_folder, adapter):
        capsys.readouterr()
        assert main([*train, str(model), *CUT, "--output_dir", str(tmp_path / "cut")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "layers in model.layers, and --model_init_kwargs makes 2; an adapter does not save the model" in line
        assert line.endswith("save the smaller model first, with save_pretrained, and train that, or take --method "
                             "full, which saves it.")  # fmt: skip
        assert not (tmp_path / "cut").exists()
    full = tmp_path / "full"
    assert main([*train, str(tiny_model_folder), *CUT, "--output_dir", str(full), "--method=full"]) == 0
    assert len(load_causal_model(str(full)).model.layers) == 2
    assert "An adapter does not save" not in caplog.text
    said = "An adapter does not save rope_parameters, rms_norm_eps of --model_init_kwargs, and every later command"
    options = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-4}
    load_causal_model(str(tiny_model_folder), use_cache=False, attention_dropout=0.1, dtype="auto", **options)
    assert f"{said} takes {tiny_model_folder} without: save the changed model first" in caplog.text


class Stacked:
    """A configuration with a name of its own for its number of layers, and perhaps one of its text."""

    attribute_map = {"num_hidden_layers": "n_layer"}  # noqa: RUF012

    def __init__(self, layers: int | None, text: Any = None, **further: int) -> None:
        self.num_hidden_layers, self.text = layers, text
        vars(self).update(further)

    def get_text_config(self) -> Any:
        return self.text or self


NEXT = Stacked(2, num_nextn_predict_layers=1)


@pytest.mark.parametrize(
    ("unused", "config", "said"),
    [
        (["stack.2.weight", "stack.3.weight"], Stacked(2), r"have 4 layers in stack, and its config.json makes 2"),
        (["stack.2.weight"], NEXT, ""),  # which predicts a further token
        (["stack.2.weight"], Stacked(2, num_mtp_layers=1), ""),
        (["stack.2.weight"], Stacked(None, NEXT), ""),
        (["stack.2.weight"], Stacked(None, Stacked(2, num_mtp_layers=1)), ""),
        (["stack.2.weight", "stack.3.weight"], NEXT, "have 4 layers in stack"),
        (["stack.2.weight"], Stacked(None, Stacked(2)), "have 3 layers in stack"),
        (["stack.2.weight"], Stacked(5), r"have 3 parts of stack, .* makes 2: give the config.json that belongs to t"),
        (["stack.2.weight"], None, "have 3 parts of stack"),
        (["deep.0.2.weight"], NEXT, r"have 3 parts of deep\.0,"),  # experts, as many as there are layers
        (["stack.2.other"], None, ""),
        (["stack.1.weight", "first.0.weight", "stack.x.weight"], None, ""),
        (["inner.stack.0.2.weight"], None, ""),
        (["2.weight", "blocks.2.weight"], Stacked(2), "have 3 layers in model.blocks"),  # saved without its prefix
    ],
)
def test_layers_beyond_the_last_are_those_named_as_the_others(unused: list[str], config: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) if said else nullcontext():
        check_weights("folder", stacked(config), {"unexpected_keys": unused})


def stacked(config: Any) -> Any:
    """A model with three stacks of two parts each."""
    parts = [torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)]) for _ in range(3)]
    model: Any = torch.nn.ModuleDict({
        "stack": parts[0],
        "first": torch.nn.Linear(2, 2),
        "model": torch.nn.ModuleDict({"blocks": parts[1]}),
        "deep": torch.nn.ModuleList([parts[2]]),
    })  # fmt: skip
    model.base_model_prefix = "model"
    if config is not None:
        model.config = config
    return model


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({}, True),
        ({"num_hidden_layers": 2}, False),
        ({"n_layer": 2}, False),
        ({"text_config": {"n_layer": 2}}, False),
        ({"device_map": {"model.layers.0": 0, "num_hidden_layers": 0}}, True),
        ({"layer_types": ["full_attention"] * 2}, True),
        ({"layer_norm_eps": 1e-5}, True),
        ({"num_layers": 2}, True),
    ],
)
def test_only_a_number_of_layers_asks_for_fewer(options: dict[str, Any], refused: bool) -> None:
    """The model's own weights train, so that its configuration is saved."""
    with pytest.raises(ValueError, match="have 3 layers in stack") if refused else nullcontext():
        check_weights("folder", stacked(Stacked(2)), {"unexpected_keys": ["stack.2.weight"]}, options, saves=True)


def test_the_names_of_a_stack_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = stacked(Stacked(2)), []
    for part in model["stack"]:
        monkeypatch.setattr(part, "named_parameters", lambda own=part.named_parameters: read.append(1) or own())
    with pytest.raises(ValueError, match="have 99 layers in stack"):
        check_layers("folder", model, [f"stack.{number}.weight" for number in range(2, 99)])
    assert len(read) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            '{"num_layers": 3}',
            "--model_init_kwargs sets num_layers, which neither transformers nor the config.json of ",
        ),
        (
            '{"num_hidden_layers": 9}',
            "that its config.json, with num_hidden_layers of --model_init_kwargs, describes (",
        ),
        (
            '{"vocab_size": 9}',
            "of the sizes in its config.json, with vocab_size of --model_init_kwargs, (lm_head.weight ",
        ),
    ],
)
def test_what_the_flags_change_is_not_laid_to_the_files(
    flags: str, said: str, tiny_model_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    train = ["train", "--model_name_or_path", str(tiny_model_folder), "--task=word-problems", "--use_cpu"]
    assert main([*train, "--output_dir", str(tmp_path / "run"), "--model_init_kwargs", flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("method", ["peft", "focused"])
def test_chats_without_a_template_are_refused_before_anything_is_measured(
    method: str, tiny_model_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    data = tmp_path / "chats.json"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data.write_text(json.dumps([{"messages": chat}] * 4))
    train = ["train", "--model_name_or_path", str(tiny_model_folder), "--data_files", str(data), "--use_cpu"]
    train += ["--bf16=false", "--max_steps=1", "--save_strategy=no", f"--method={method}"]
    assert main([*train, "--output_dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "ist train: error: The rows are chats, and this model's tokenizer has no chat template: give"
    )
    assert not (tmp_path / "run").exists()
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}")
    given = ["--chat_template_path", str(template), "--output_dir", str(tmp_path / "given")]
    assert main([*train, *given]) == 0, capsys.readouterr().err


RESIZED = "--model_init_kwargs", '{"ignore_mismatched_sizes": true, "vocab_size": 999}'


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_weights_of_other_sizes_begin_anew_where_that_is_asked_for_and_they_are_saved(
    tiny_model_folder: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps({"instruction": "a", "output": "b"}) + "\n") * 8)
    train = [
        "train", "--model_name_or_path", str(tiny_model_folder), "--data_files", str(data), "--use_cpu", "--bf16=false",
        "--max_steps=1", "--num_test_problems=0", "--save_strategy=no", *RESIZED,
    ]  # fmt: skip
    capsys.readouterr()
    assert main([*train, "--output_dir", str(tmp_path / "frozen")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ignore_mismatched_sizes starts 2 weights of " in line
    assert "does not save the model that it is on: save the resized model first, with resize_token_embeddings" in line
    assert line.endswith("and save_pretrained, and train that, or take --method full, which saves it.")
    said = f"2 weights of {tiny_model_folder} are newly initialised, since their sizes differ (lm_head.weight is "
    assert main([*train, "--output_dir", str(tmp_path / "full"), "--method=full"]) == 0, capsys.readouterr().err
    assert said in caplog.text
    assert load_causal_model(str(tmp_path / "full")).config.vocab_size == 999


def test_nothing_that_does_not_train_begins_anew(tiny_model_folder: Path) -> None:
    options: dict[str, Any] = {"vocab_size": 999}
    with pytest.raises(ValueError, match=r"are not of the sizes in its config\.json"):
        load_causal_model(str(tiny_model_folder), **options)
    with pytest.raises(ValueError, match="starts 2 weights"):
        load_causal_model(str(tiny_model_folder), ignore_mismatched_sizes=True, **options)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_an_adapter_on_a_resized_base_is_refused_whatever_it_saves(
    modules: list[str], tiny_model_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """A tied head would be random and frozen beside the trained copy of the embedding."""
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    changed(CONFIG, tie_word_embeddings=True)(model)
    rewritten(WEIGHTS, lambda w: {k: v for k, v in w.items() if "lm_head" not in k})(model)
    train = ["train", "--model_name_or_path", str(model), "--task=word-problems", "--use_cpu", *RESIZED]
    flags = ["--lora_modules_to_save", *modules, "--output_dir", str(tmp_path / "run")]
    assert main([*train, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "save the resized model first, with resize_token_embeddings and save_pretrained" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("quantised", "missing", "said"),
    [
        (False, {"proj.weight_zero_point"}, "lack 1 weight "),
        (True, {"proj.weight_zero_point"}, ""),  # which begins as zero
        (True, {"proj.weight"}, "lack 1 weight "),
        (False, {"first.weight"}, ""),  # is tied to the second
        (False, {"first.weight", "second.weight"}, "lack 1 weight "),
    ],
)
def test_what_is_missing_is_what_would_be_random(quantised: bool, missing: set[str], said: str) -> None:
    model: Any = torch.nn.ModuleDict({"first": torch.nn.Linear(2, 2), "second": torch.nn.Linear(2, 2)})
    model["second"].weight = model["first"].weight
    model["proj"] = torch.nn.Linear(2, 2)
    model["proj"].weight_zero_point = torch.nn.Parameter(torch.zeros(2))
    model.hf_quantizer = object() if quantised else None
    with pytest.raises(ValueError, match=said) if said else nullcontext():
        check_weights("folder", model, {"missing_keys": missing})


def test_a_whole_model_beside_an_adapter_is_not_passed_over(
    tiny_model_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    both = Path(shutil.copytree(tiny_model_folder, tmp_path / "both"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(str(both))
    assert main(["eval", "--model_name_or_path", str(both), "--tasks", "word-problems"]) == 2
    assert f"{both} holds a whole model and an adapter" in capsys.readouterr().err


def test_a_token_beyond_the_embedding_is_named(tiny_model_folder: Path, tmp_path: Path, capsys: Any) -> None:
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    rows = base.get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens([f"<{number}>" for number in range(rows)])
    tokenizer.eos_token = f"<{rows - 1}>"
    tokenizer.save_pretrained(model)
    assert (
        main(["train", "--model_name_or_path", str(model), "--task=word-problems", "--output_dir", str(tmp_path)]) == 2
    )
    assert f"and the model's embedding has {rows} rows" in capsys.readouterr().err


def partitioned(rows: int, columns: int) -> Any:
    """A parameter as ZeRO-3 leaves it on a process: empty, with its whole shape beside it."""
    weight = torch.nn.Parameter(torch.zeros(0))
    weight.ds_shape = torch.Size((rows, columns))  # type: ignore[attr-defined]
    return weight


class Tokenizer:
    """Of which the last token ends a text."""

    eos_token, pad_token = "</s>", None
    eos_token_id, pad_token_id = 7, None


def with_embedding(weight: Any) -> Any:
    class Model:
        def get_input_embeddings(self) -> Any:
            return SimpleNamespace() if weight is None else SimpleNamespace(weight=weight)

    return Model()


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.zeros(8, 2), ""),
        (torch.zeros(7, 2), "the model's embedding has 7 rows"),
        (None, ""),  # of parts, or computed: how many rows it has cannot be told
        (partitioned(8, 2), ""),
        (partitioned(7, 2), "has eos_token '</s>' with the number 7, and the model's embedding has 7 rows"),
    ],
    ids=["fits", "too small", "no weight", "ZeRO-3, fits", "ZeRO-3, too small"],
)
def test_tokens_of_any_embedding(weight: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) if said else nullcontext():
        check_tokens("folder", with_embedding(weight), Tokenizer())


REMOTE = """
from transformers import LlamaForCausalLM

class Mine(LlamaForCausalLM):
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        kwargs.pop("output_loading_info", None)
        return super().from_pretrained(*args, **kwargs)
"""


def test_a_model_with_code_of_its_own_that_says_nothing_of_its_loading(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])  # transformers adds the folder of such code
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    (model / "mine.py").write_text(REMOTE)
    changed(CONFIG, auto_map={"AutoModelForCausalLM": "mine.Mine"}, architectures=["Mine"])(model)
    found = load_causal_model(str(model), trust_remote_code=True)
    assert type(found).__name__ == "Mine"
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder).state_dict()
    assert all(torch.equal(weight, plain[name]) for name, weight in found.state_dict().items())
    rewritten(WEIGHTS, lambda w: {**w, "model.norm.weight": w["model.norm.weight"] * float("nan")})(model)
    with pytest.raises(ValueError, match=r"hold NaN .*model\.norm\.weight"):
        load_causal_model(str(model), trust_remote_code=True)


# ---- Adapters


@pytest.fixture(scope="module")
def adapter(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(str(folder))
    return folder


def without_layer(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: weight for name, weight in weights.items() if "layers.1." not in name}


def other_names(weights: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("self_attn", "attention"): weight for name, weight in weights.items()}


ADAPTERS = [
    (rewritten(ADAPTER, without_layer), "lacks 2 weights that this model takes (base_model.model.model.layers.1."),
    (rewritten(ADAPTER, other_names), "it belongs to another base, or its file is incomplete"),
    (changed("adapter_config.json", r=8), "size mismatch for base_model"),
    (changed("adapter_config.json", peft_type="NOPE"), "cannot be loaded (KeyError: 'NOPE')"),
    (written(ADAPTER, b"cut"), "cannot be loaded (SafetensorError: "),
    (
        pickled(RUNS),
        RUNS_CODE,
    ),
    (written(ADAPTER, None), "is incomplete: its folder lacks a file, such as the weights"),
]


@pytest.mark.parametrize(("change", "said"), ADAPTERS)
def test_an_adapter_that_does_not_fit_is_one_line(
    tiny_model_folder: Path, adapter: Path, tmp_path: Path, capsys: Any, change: Callable[[Path], None], said: str
) -> None:
    """PEFT trains and evaluates one that lacks weights as if its layers had never been trained."""
    mine = Path(shutil.copytree(adapter, tmp_path / "mine"))
    change(mine)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    for command in (
        ["train", "--model_name_or_path", str(mine), "--output_dir", str(tmp_path / "run"), "--use_cpu"],
        ["eval", "--adapter", str(mine), "--protocol=loss"],
    ):
        capsys.readouterr()
        assert main([*command, "--data_files", str(data)]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert f"The adapter in {mine}" in error


def test_a_whole_adapter_loads_without_a_word_and_one_with_more_layers_is_said(
    tiny_model_folder: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = AutoPeftModelForCausalLM.from_pretrained(adapter).state_dict()
    found = load_adapter(load_causal_model(str(tiny_model_folder)), str(adapter)).state_dict()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert not caplog.text
    mine = Path(shutil.copytree(adapter, tmp_path / "mine"))
    rewritten(ADAPTER, lambda w: {**w, **{k.replace("layers.1.", "layers.91."): v.clone() for k, v in w.items()}})(mine)
    load_adapter(load_causal_model(str(tiny_model_folder)), str(mine))
    assert f"2 weights of the adapter in {mine} are not used (base_model.model.model.layers.91." in caplog.text


@pytest.mark.parametrize(
    ("error", "command", "way"),
    [
        (ModuleNotFoundError("No module named 'trl'", name="trl"), "train", "'ist-peft[train] @ git+"),
        (ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"), "train", "'ist-peft[report] @ git+"),
        (ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn.x"), "eval", "pip install flash-attn"),
        (ModuleNotFoundError("No module named 'sklearn'", name="sklearn.metrics"), "eval", "pip install scikit-learn"),
        (ModuleNotFoundError("No module named 'ist.x'", name="ist.x"), "report", "'ist-peft[report] @ git+"),
        (ModuleNotFoundError("No module named '_lzma'", name="_lzma"), "train", "it is a part of Python, and this one"),
        (ModuleNotFoundError("gone"), "train", "gone: install it with pip"),
        (PackageNotFoundError("The 'deepspeed>=0.9.3' distribution was not found."), "train", "found: install it with"),
    ],
)
def test_a_missing_package_is_installed_by_its_own_name(error: ModuleNotFoundError, command: str, way: str) -> None:
    assert way in describe_missing(error, command)
    assert "\n" not in describe_missing(error, command)
