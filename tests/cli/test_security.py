"""Nothing unsafe: recipes run no code and stay in their folder, no pickle is read, text from data stays text."""

from __future__ import annotations

import ast
import io
import itertools
import json
import logging
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file

from ist.cli.compare.recipe import read_comparison
from ist.cli.console import PlainConsole
from ist.cli.display import Display
from ist.cli.eval.arguments import eval_parser
from ist.cli.main import main
from ist.cli.printable import one_line, printable, printable_logs
from ist.cli.recipes.files import list_recipes, read_recipe
from ist.cli.recipes.safety import EVALUATION_KEYS, TRAINING_KEYS, check_safe, without_authority
from ist.cli.train.arguments import known_flags, parse_arguments

SOURCES = sorted((Path(__file__).parents[2] / "src" / "ist").rglob("*.py"))
COMMAND_LINE = r"on the command line as --"


FORBIDDEN = [
    ({"trust_remote_code": True}, "sets trust_remote_code, which runs code"),
    ({"trust_remote_code": False}, "sets trust_remote_code"),
    ({"model_init_kwargs": {"weights_only": False}}, "sets model_init_kwargs, which can run code"),
    ({"model_init_kwargs": '{"trust_remote_code": true}'}, "sets model_init_kwargs"),
    ({"attn_implementation": "kernels-community/flash-attn"}, "may run code from a hub"),
    ({"env": {"LD_PRELOAD": "x.so"}}, "changes the environment"),
    ({"deepspeed": "ds.json"}, "names code"),
    ({"overwrite": True}, "deletes another run"),
    ({"resume_from_checkpoint": "auto"}, "checkpoints of another run"),
    ({"push_to_hub": True}, "publishes the run"),
    ({"hub_model_id": "me/secret"}, "publishes the run"),
    ({"hub_token": "hf_x"}, "is a secret"),
    ({"lora_target_modules": ["q_proj", "--overwrite"]}, "which looks like a flag"),
]
"""What no recipe can set, a trusted one neither."""

NOT_LISTED = [
    ({"output_dir": "runs/mine"}, "sets output_dir, which is not among"),
    ({"fsdp_config": "fsdp.json"}, "sets fsdp_config, which is not among"),
    ({"accelerator_config": "a.json"}, "sets accelerator_config, which is not among"),
    ({"chat_template_path": "template.jinja"}, "sets chat_template_path, which is not among"),
    ({"datasets": [{"path": "pandas", "data_files": "rows.pkl"}]}, "sets datasets, which is not among"),
    ({"torch_compile_backend": "mine"}, "sets torch_compile_backend, which is not among"),
    ({"report_to": "wandb"}, "sets report_to, which is not among"),
    ({"liger_kernel_config": {"a": True}}, "sets liger_kernel_config, which is not among"),
    ({"lr_scheduler_kwargs": {"a": {"b": 1}}}, "keywords with plain values"),
    ({"data_files": ["rows.json", "/etc/passwd"]}, "sets data_files to '/etc/passwd'"),
    ({"data_files": ["../rows.json"]}, "paths in a recipe are relative"),
    ({"data_folder": "~/data"}, "paths in a recipe are relative"),
    ({"data_folder": "C:\\data"}, "paths in a recipe are relative"),
    ({"data_folder": "..\\data"}, "paths in a recipe are relative"),
    ({"model_name_or_path": "/models/llama"}, "paths in a recipe are relative"),
    ({"dataset_name": "https://example.org/rows.json"}, "paths in a recipe are relative"),
    ({"fixed_layers": "top:../scores.json"}, "sets fixed_layers to 'top:../scores.json'"),
    ({"test_tasks": ["evil/task.yaml"]}, "is not the name of a task"),
    ({"lora_target_modules": "(.*)*(.*)*(.*)*(.*)*q_projx"}, "is not the name of a module"),
    ({"lora_target_modules": ["q_proj", "(a|a)*$"]}, "is not the name of a module"),
    ({"bottleneck_target_modules": [".*"]}, "is not the name of a module"),
]
"""What only the user's own recipe can set."""


@pytest.mark.parametrize(("entry", "said"), [*FORBIDDEN, *NOT_LISTED])
def test_a_recipe_cannot(entry: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(yaml.safe_dump({"task": "word-problems", **entry}))
    with pytest.raises(ValueError, match=COMMAND_LINE) as error:
        parse_arguments(["--recipe", str(file)])
    assert str(error.value).startswith("theirs.yaml sets ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("entry", "said"), [*FORBIDDEN, *NOT_LISTED])
def test_a_comparison_cannot(entry: dict[str, Any], said: str, tmp_path: Path) -> None:
    if "output_dir" in entry or "resume_from_checkpoint" in entry:
        return  # `ist compare` gives them itself, and says so.
    file = tmp_path / "theirs.yaml"
    for methods, flags in (({"a": entry}, {}), ({"a": {}}, entry)):
        file.write_text(yaml.safe_dump({"methods": methods, "flags": {"task": "word-problems", **flags}}))
        with pytest.raises(ValueError, match=COMMAND_LINE) as error:
            read_comparison(file)
        assert said in str(error.value)


@pytest.mark.parametrize(("entry", "said"), FORBIDDEN)
def test_a_trusted_recipe_cannot_run_or_delete(entry: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=COMMAND_LINE) as error:
        check_safe(entry, "mine.yaml", trusted=True)
    assert said in str(error.value)


@pytest.mark.parametrize("entry", [entry for entry, _ in NOT_LISTED])
def test_a_trusted_recipe_can(entry: dict[str, Any]) -> None:
    check_safe(entry, "mine.yaml", trusted=True)


def test_trust_is_a_flag_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"task: word-problems\nbf16: false\noutput_dir: {tmp_path}\n")
    assert parse_arguments(["--recipe", str(file), "--trust_recipe"]).training.output_dir == str(tmp_path)
    file.write_text("task: word-problems\ntrust_recipe: true\n")
    with pytest.raises(ValueError, match="unknown key 'trust_recipe'"):
        parse_arguments(["--recipe", str(file)])


def test_a_recipe_is_not_trusted_by_its_name(tmp_path: Path) -> None:
    """`runs/quickstart` is made anew each time; a file of that name trains elsewhere."""
    (tmp_path / "quickstart.yaml").write_text("task: word-problems\nbf16: false\n")
    run = parse_arguments(["--recipe", str(tmp_path / "quickstart.yaml")])
    assert (run.recipe, run.training.output_dir) == ("quickstart-file", "runs/quickstart-file")
    (tmp_path / "...yaml").write_text("task: word-problems\nbf16: false\n")
    assert parse_arguments(["--recipe", str(tmp_path / "...yaml")]).training.output_dir == "runs/recipe"


def test_a_link_does_not_lead_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "data").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "work")
    check_safe({"data_files": ["rows.json"]}, "theirs.yaml")
    with pytest.raises(ValueError, match="without links"):
        check_safe({"data_files": ["data/rows.json"]}, "theirs.yaml")


LAUGHS = 'a: &a ["x","x","x","x","x","x","x","x","x"]\n' + "".join(
    f"{name}: &{name} [{','.join([f'*{former}'] * 9)}]\n" for former, name in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "repeats an alias too often"),
        ("data_files: &a [*a]\n", "a value that contains itself in line 1"),
        ("a: &a {<<: *a}\n", "a value that contains itself"),
        ("data_files: " + "[" * 49_000 + "]" * 49_000 + "\n", "nests too deep"),
        ("data_files: " + "[" * 50 + "]" * 50 + "\n", "nests too deep"),
        ("max_steps: 1" + "0" * 5000 + "\n", "has a number of 5001 characters in line 1"),
        ("a: x\n" * 30_000, "a recipe has at most 100000"),
        ("? [a, b]\n: 1\n", "is not YAML"),
        ("1: 2\n", "holds no `key: value` lines"),
        ("a: 1\nb: 2\na: 3\n", "sets 'a' in line 1 and again in line 3: keep one"),
        ("m:\n  a: 1\n  'a': 2\n", "sets 'a' in line 2 and again in line 3: keep one"),
        ("a: 2020-13-45\n", "cannot be read: month must be in 1..12"),
        ("a: \x00\n", "is not YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", "is not YAML"),
        ("", "holds no `key: value` lines"),
    ],
    ids=lambda value: value[:20],
)
def test_a_hostile_file_is_refused_at_once(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_recipe(tmp_path / "theirs.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["--lora_r", "4", "--overwrite", "true", "--mu=3"], ["--lora_r", "4", "--mu=3"]),
        (["--trust-recipe", "--recipe", "x"], ["--recipe", "x"]),
        (["--attn_implementation", "sdpa", "--mu=3"], ["--attn_implementation", "sdpa", "--mu=3"]),
        (["--resume-from-checkpoint=last", "--data_files", "a", "b"], ["--data_files", "a", "b"]),
    ],
)
def test_recorded_arguments_have_no_authority(arguments: list[str], kept: list[str]) -> None:
    assert without_authority(arguments, "ist_result.json") == kept


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trust-remote-code"], "sets trust_remote_code, which runs code"),
        (["--model_init_kwargs={}"], "sets model_init_kwargs"),
        (["--attn_implementation=evil/kernel"], "sets attn_implementation to 'evil/kernel', which may run code"),
        (["--lora_target_modules", "q_proj", "(.+)+!"], "sets lora_target_modules to .*, which is no name of a module"),
        (["--attn-implementation", "evil/kernel"], "sets attn_implementation to 'evil/kernel', which may run code"),
        ("--lora_r 4", "as a list of texts"),
        ([1], "as a list of texts"),
    ],
)
def test_recorded_arguments_run_no_code(arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        without_authority(arguments, "ist_result.json")


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
    check_safe({"model_name_or_path": text, "data_files": [text]}, "recipe.yaml")


def test_the_list_names_flags_that_exist() -> None:
    """And no flag of TRL's gets on it by itself."""
    names = {action.dest for action in eval_parser()._actions}
    assert known_flags() >= TRAINING_KEYS
    assert names >= EVALUATION_KEYS


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
    display.console = PlainConsole(file=io.StringIO(), width=200)
    assert Display().console._markup is False
    trap = "[bold red]a[/bold red] [link=file:///etc/passwd]b[/link] [/]"
    result = {"before": {trap: 1.0}, "after": {trap: 2.0}, "num_steps": 1, "train_seconds": 1, "peak_memory_bytes": 1}
    result["adapter"] = "lora"
    display.end(result, tmp_path / "[red]run[", None)
    run = SimpleNamespace(
        recipe=trap,
        model=SimpleNamespace(model_name_or_path=trap),
        ist=SimpleNamespace(adapter="none", method="peft"),
        selector=None,
        unused=[],
    )
    import torch

    args = SimpleNamespace(device="cpu", world_size=1, max_steps=-1, learning_rate=0.1, lr_scheduler_type=trap)
    trainer = SimpleNamespace(model=torch.nn.Linear(2, 2), args=args, train_dataset=iter(()), eval_dataset=None)
    display.begin(run, trainer)
    shown = display.console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("[bold red]a[/bold red] [link=file:///etc/passwd]b[/link] [/]") >= 3
    assert "[red]run[" in shown
    assert "\x1b" not in shown


ESCAPES = "\x1b[2J\x1b]0;owned\x07 \r \x9b31m \u202e \u2028 \x08"


@pytest.mark.parametrize("terminal", [True, False])
def test_escapes_in_what_is_printed_are_shown(terminal: bool) -> None:
    console = PlainConsole(file=io.StringIO(), width=200, force_terminal=terminal)
    table = Table(title=ESCAPES)
    table.add_column(ESCAPES)
    table.add_row(ESCAPES)
    for renderable in (ESCAPES, Text(ESCAPES), Text("bold", "bold"), table):
        console.print(renderable)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("\\x1b[2J") == 5
    assert not set("\x07\x08\r\x9b\u202e\u2028") & set(shown)
    assert "\x1b[2J" not in shown
    assert ("\x1b[1m" in shown) is terminal  # rich's own bold


def test_escapes_in_a_text() -> None:
    assert printable("naïve ■ 日本\n") == "naïve ■ 日本\n"
    assert printable("a\x1b[31mb") == "a\\x1b[31mb"
    assert one_line("a\n\x1b b\ud800") == "a \\x1b b\\ud800"


def test_escapes_in_a_warning_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with printable_logs():
        shown = warnings.formatwarning("file \x1b[2J is missing", UserWarning, "x.py", 1, "")
    assert shown == "UserWarning: file \\x1b[2J is missing (x.py:1)\n"
    assert "\x1b" in warnings.formatwarning("\x1b", UserWarning, "x.py", 1, "")


def test_a_warning_of_another_library_is_one_line() -> None:
    """Python would print the line of code below it, and the text as it is."""
    import trl

    with printable_logs():
        shown = warnings.formatwarning(FutureWarning("two\n  lines"), FutureWarning, trl.__file__, 3)
    assert shown == "FutureWarning: two lines (trl/__init__.py:3)\n"
    assert len(warnings.formatwarning(UserWarning("a"), UserWarning, __file__, 1).splitlines()) == 2, "as before"


def test_escapes_in_a_log_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with printable_logs():
        logging.getLogger("ist.cli.train").warning("row %s", "\x1b[2J")
    assert capsys.readouterr().err == "row \\x1b[2J\n"


BASE, KIND = (
    json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/none", "target_modules": ["q_proj"], **changes})
    for changes in ({"base_model_name_or_path": "/none\x1b[2J"}, {"peft_type": "LO\x1b[2J"})
)


@pytest.mark.parametrize(
    ("files", "flags"),
    [
        ({"x.yaml": '"\\e[2Jkey": 1\n'}, ["--recipe", "x.yaml"]),
        ({"x.yaml": 'task: "\\e[2J"\n'}, ["--recipe", "x.yaml"]),
        ({"x.json": json.dumps([{"\x1b[2J": "a"}])}, ["--model_name_or_path=x", "--data_files=x.json"]),
        ({}, ["--\x1b[2Jflag"]),
        ({"a/adapter_config.json": BASE}, ["--model_name_or_path=a", "--task=word-problems", "--bf16=false"]),
        ({"a/adapter_config.json": KIND}, ["--adapter=a", "--model_name_or_path=x", "--task=word-problems"]),
    ],
    ids=["key of a recipe", "value of a recipe", "column of data", "flag", "base of an adapter", "kind of an adapter"],
)
def test_escapes_in_an_error_are_shown(
    files: dict[str, str],
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert main(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert "x1b[2J" in error


def test_adapters_are_safetensors(tmp_path: Path) -> None:
    from tests.helpers.trainers import make_trainer

    trainer = make_trainer(tmp_path, max_steps=2, save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    for folder in (tmp_path / "adapter", tmp_path / "checkpoint-2"):
        assert load_file(folder / "adapter_model.safetensors")
        assert not [path for path in folder.glob("adapter*") if path.suffix in (".bin", ".pt", ".pkl")]
