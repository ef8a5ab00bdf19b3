"""Nothing unsafe: recipes run no code and stay in their folder, no pickle is read, text from data stays text."""

from __future__ import annotations

import ast
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file

from ist.cli.display import Display
from ist.cli.recipes.files import list_recipes
from ist.cli.recipes.safety import check_safe
from ist.cli.train.arguments import parse_arguments

SOURCES = sorted((Path(__file__).parents[2] / "src" / "ist").rglob("*.py"))
COMMAND_LINE = r"on the command line as --"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"trust_remote_code": True}, "sets trust_remote_code, which runs code"),
        ({"trust_remote_code": False}, "sets trust_remote_code"),
        ({"model_init_kwargs": {"trust_remote_code": True}}, "sets trust_remote_code"),
        ({"model_init_kwargs": '{"trust_remote_code": true}'}, "sets trust_remote_code"),
        ({"model_init_kwargs": {"use_kernels": True}}, "runs code from a hub"),
        ({"model_init_kwargs": {"attn_implementation": "kernels/flash"}}, "runs code from a hub"),
        ({"attn_implementation": "kernels-community/flash-attn"}, "runs code from a hub"),
        ({"env": {"LD_PRELOAD": "x.so"}}, "changes the environment"),
        ({"deepspeed": "ds.json"}, "names code"),
        ({"fsdp_config": "fsdp.json"}, "outside of the run"),
        ({"accelerator_config": "a.json"}, "outside of the run"),
        ({"push_to_hub": True}, "publishes the run"),
        ({"hub_model_id": "me/secret"}, "publishes the run"),
        ({"hub_token": "hf_x"}, "is a secret"),
        ({"output_dir": "/etc/ist"}, "paths in a recipe are relative"),
        ({"output_dir": "~/run"}, "paths in a recipe are relative"),
        ({"output_dir": "runs/../../x"}, "paths in a recipe are relative"),
        ({"output_dir": "C:\\runs"}, "paths in a recipe are relative"),
        ({"output_dir": "..\\runs"}, "paths in a recipe are relative"),
        ({"data_files": ["rows.json", "/etc/passwd"]}, "sets data_files to '/etc/passwd'"),
        ({"data_files": '["../rows.json"]'}, "paths in a recipe are relative"),
        ({"model_name_or_path": "/models/llama"}, "paths in a recipe are relative"),
        ({"dataset_name": "https://example.org/rows.json"}, "paths in a recipe are relative"),
        ({"resume_from_checkpoint": "../other/checkpoint-3"}, "paths in a recipe are relative"),
        ({"chat_template_path": "/tmp/template.jinja"}, "paths in a recipe are relative"),
        ({"datasets": [{"path": "a", "data_dir": "/etc"}]}, "sets data_dir to '/etc'"),
    ],
)
def test_a_recipe_cannot(entry: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(yaml.safe_dump({"task": "word-problems", **entry}))
    with pytest.raises(ValueError, match=COMMAND_LINE) as error:
        parse_arguments(["--recipe", str(file)])
    assert str(error.value).startswith("theirs.yaml sets ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_line_can(tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path), "--model_name_or_path", "x", "--task", "word-problems", "--bf16", "false"]
    assert parse_arguments(flags).training.trust_remote_code is False
    assert parse_arguments([*flags, "--trust_remote_code"]).training.trust_remote_code is True
    assert parse_arguments(flags).training.output_dir == str(tmp_path)


@pytest.mark.parametrize("file", list_recipes(), ids=lambda file: file.stem)
def test_our_recipes_are_safe(file: Path) -> None:
    check_safe(yaml.safe_load(file.read_text(encoding="utf-8")), file.name)


@pytest.mark.parametrize("text", ["HuggingFaceTB/SmolLM2-135M", "</s>", "data/rows.json", "cosine", "1e-4", "a..b"])
def test_ordinary_values_pass(text: str) -> None:
    check_safe({"key": text, "list": [text]}, "recipe.yaml")


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


def unsafe(source: str) -> list[str]:
    """What a source does that it must not."""
    tree = ast.parse(source)
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found = sorted(imports & {"pickle", "dill", "cloudpickle", "marshal", "shelve"})
    for name, call in calls(tree):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in ("eval", "exec", "compile", "__import__", "os.system", "yaml.load", "yaml.unsafe_load"):
            found.append(name)
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if given.get("shell") == "True":
            found.append("shell=True")
        if name.endswith(("gather_object", "broadcast_object_list", "all_gather_object")):
            found.append(name)  # They pickle.
        if given.get("trust_remote_code") == "True":
            found.append("trust_remote_code=True")
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_the_source_does_nothing_unsafe(file: Path) -> None:
    assert unsafe(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "torch.load(f)", "eval(x)", "yaml.load(f)", "run(x, shell=True)", "dist.all_gather_object(a, b)"],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert len(unsafe(source)) == 1


def test_text_from_data_is_not_markup(tmp_path: Path) -> None:
    display = Display()
    display.console = Console(file=io.StringIO(), markup=False, highlight=False, width=200)
    assert Display().console._markup is False
    trap = "[bold red]a[/bold red] [link=file:///etc/passwd]b[/link] [/]"
    result = {"before": {trap: 1.0}, "after": {trap: 2.0}, "num_steps": 1, "train_seconds": 1, "peak_memory_bytes": 1}
    result["adapter"] = "lora"
    display.end(result, tmp_path / "[red]run[", None)
    run = SimpleNamespace(
        recipe=trap,
        model=SimpleNamespace(model_name_or_path=trap),
        ist=SimpleNamespace(adapter="lora", method="all"),
        selector=None,
        unused=[],
    )
    import torch

    args = SimpleNamespace(device="cpu", world_size=1)
    display.begin(run, SimpleNamespace(model=torch.nn.Linear(2, 2), args=args))
    shown = display.console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("[bold red]a[/bold red] [link=file:///etc/passwd]b[/link] [/]") >= 3
    assert "[red]run[" in shown
    assert "\x1b" not in shown


def test_adapters_are_safetensors(tmp_path: Path) -> None:
    from tests.helpers.trainers import make_trainer

    trainer = make_trainer(tmp_path, max_steps=2, save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    for folder in (tmp_path / "adapter", tmp_path / "checkpoint-2"):
        assert load_file(folder / "adapter_model.safetensors")
        assert not [path for path in folder.glob("adapter*") if path.suffix in (".bin", ".pt", ".pkl")]
