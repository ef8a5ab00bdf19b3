"""Recipes of comparisons: what they say, what they may not say, and that those of the library fit the real flags."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ist.cli.compare.command import parse_options, read_pair
from ist.cli.compare.recipe import CompareRecipe, find_comparison, read_comparison, read_methods, to_arguments
from ist.cli.recipes.files import list_comparisons
from ist.cli.train.arguments import parse_arguments

CPU = ["--bf16=false", "--use_cpu"]
SMALL: dict[str, Any] = {
    "methods": {"LoRA": {"method": "peft"}, "random": {"method": "random"}, "IST": {"mu": 7}},
    "flags": {"task": "word-problems", "max_steps": 3},
}


def read(tmp_path: Path, recipe: Any, more_flags: Any = (), **changes: Any) -> CompareRecipe:
    file = tmp_path / "compare-mine.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return read_comparison(file, [*CPU, *more_flags], **changes)


def test_what_a_recipe_says(tmp_path: Path) -> None:
    recipe = read(tmp_path, {**SMALL, "seeds": [3, 4], "learning_rates": ["1e-4", 2e-4]})
    assert (recipe.name, recipe.seeds, recipe.budget) == ("mine", (3, 4), "steps")
    assert [method.name for method in recipe.methods] == ["LoRA", "random", "IST"]
    assert [method.against for method in recipe.methods] == [("random",), ("LoRA",), ("LoRA", "random")]
    assert {method.learning_rates for method in recipe.methods} == {(1e-4, 2e-4)}


def test_what_a_method_says_goes_before_what_all_say(tmp_path: Path) -> None:
    methods = {"a b": {"method": "peft"}, "IST": {"max_steps": 9, "against": "a b", "learning_rates": [0.1]}}
    recipe = read(tmp_path, {**SMALL, "methods": methods, "learning_rates": [0.2]}, ["--mu=5"])
    plain, ist = recipe.methods
    assert (plain.folder, plain.learning_rates, ist.learning_rates) == ("a-b", (0.2,), (0.1,))
    run = parse_arguments(recipe.arguments(ist, 4, tmp_path / "run", {"learning_rate": 0.3}))
    assert (run.training.max_steps, run.training.seed, run.ist_config.mu) == (9, 4, 5.0)
    assert (run.training.learning_rate, run.training.output_dir) == (0.3, str(tmp_path / "run"))


TIMED: list[tuple[Any, dict[str, Any], dict[str, str]]] = [
    (["LoRA", "random"], {}, {"LoRA": "LoRA", "random": "LoRA", "IST": "LoRA"}),
    (None, {}, {"LoRA": "LoRA", "random": "LoRA", "IST": "LoRA"}),
    ("random", {}, {"LoRA": "random", "random": "random", "IST": "random"}),
    ([], {}, {"LoRA": "LoRA", "random": "random", "IST": "IST"}),
    # Who is another's reference keeps its own seconds, whatever it is paired with itself.
    (["LoRA"], {"IST": ["random"]}, {"LoRA": "LoRA", "random": "random", "IST": "random"}),
    ([], {"LoRA": "IST", "IST": "LoRA"}, {"LoRA": "LoRA", "random": "random", "IST": "LoRA"}),
    ([], {"LoRA": "random", "random": "IST", "IST": "LoRA"}, {"LoRA": "LoRA", "random": "IST", "IST": "IST"}),
]
"""What the recipe and the methods say in `against`, and whose seconds each method is given at equal time."""


@pytest.mark.parametrize(("against", "own", "timed"), TIMED)
def test_pairs_at_equal_time_have_the_seconds_of_one_method(against: Any, own: Any, timed: dict[str, str]) -> None:
    methods = {name: {**flags, "against": own.get(name)} for name, flags in SMALL["methods"].items()}
    read_all = read_methods({**SMALL, "methods": methods, "against": against}, "mine.yaml", None)
    assert {method.name: method.time_reference for method in read_all} == timed
    recipe = CompareRecipe("mine", read_all, (0,))
    for name, others in recipe.pairs("seconds").items():
        assert others == [other for other in recipe.pairs()[name] if timed[other] == timed[name]]
    assert all(timed[reference] == reference for reference in timed.values())


def test_equal_time_without_its_reference_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the runs of 'LoRA', whose seconds 'random' is given: add it to --meth"):
        read(tmp_path, {**SMALL, "budget": "seconds"}, methods=["random", "IST"])


def test_equal_time_that_compares_nothing_is_refused(tmp_path: Path) -> None:
    """Of a chain, whose middle is another's reference and is not trained again, the first two alone."""
    methods = {"LoRA": {"method": "peft"}, "random": {"against": "LoRA"}, "IST": {"against": "random"}}
    chain = {**SMALL, "methods": {n: {**SMALL["methods"][n], **m} for n, m in methods.items()}, "against": []}
    assert read(tmp_path, {**chain, "budget": "seconds"}).pairs("seconds")["IST"] == ["random"]
    with pytest.raises(
        ValueError, match=r"no two of these methods are compared \('random' is given .* of 'random', and"
    ):
        read(tmp_path, chain, budget="seconds", methods=["LoRA", "random"])


def test_the_command_line_goes_before_the_recipe(tmp_path: Path) -> None:
    changes = {"seeds": [8], "methods": ["LoRA"], "budget": "seconds", "evaluation": {"tasks": "boolq"}}
    recipe = read(tmp_path, {**SMALL, "evaluation": {"tasks": "piqa", "protocol": "loss"}}, **changes)
    assert ([method.name for method in recipe.methods], recipe.seeds, recipe.budget) == (["LoRA"], (8,), "seconds")
    assert recipe.evaluation == {"tasks": "boolq", "protocol": "loss"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metods": {}}, "compare-mine.yaml has the unknown key 'metods': did you mean 'methods'?"),
        ({"methods": {}}, "needs `methods:`, a name for each"),
        ({"methods": ["LoRA"]}, "needs `methods:`, a name for each"),
        ({"methods": {"x": {"mo": 1}}}, "compare-mine.yaml has the unknown key 'mo'"),
        ({"methods": {"x": {"method": "best"}}}, "method 'x': method='best' is unknown"),
        ({"methods": {"x": {"seed": 1}}}, "sets seed, which ist compare gives to each run itself"),
        ({"methods": {"x": {"against": "y"}}}, "against of x='y' is unknown: choose one of 'x'"),
        ({"methods": {"a b": {}, "a-b": {}}}, "have the same folder (a-b, a-b)"),
        ({"methods": {"..": {}}}, "names a method '..': begin it with a letter"),
        ({"flags": {"output_dir": "runs"}}, "sets output_dir, which ist compare gives"),
        ({"flags": {"task": "word-problems", "trust_remote_code": True}}, "sets trust_remote_code, which runs code"),
        ({"methods": {"x": {"data_files": ["/etc/passwd"]}}}, "sets data_files to '/etc/passwd'"),
        ({"evaluation": {"data_folder": "../data"}}, "sets data_folder to '../data'"),
        ({"methods": {"x": {"fixed_layers": "top:/etc/passwd"}}}, "sets fixed_layers to 'top:/etc/passwd'"),
        ({"methods": {"x": {"fixed_layers": "bottom:../a.json"}}}, "sets fixed_layers to 'bottom:../a.json'"),
        ({"evaluation": "boolq"}, "evaluation='boolq' in compare-mine.yaml is no list of flags"),
        (
            {"evaluation": {"tasks": "boolq", "protocol": "guess"}},
            "evaluation: --protocol guess is unknown: give one of generate, ",
        ),
        ({"evaluation": {"task": "boolq"}}, "evaluation: has the unknown key 'task': did you mean 'tasks'?"),
        ({"evaluation": {"adapter": "x"}}, "The evaluation sets adapter, which ist compare gives"),
        ({"seeds": [1, 1]}, "seeds=[1, 1] is not a list of different whole numbers"),
        ({"seeds": []}, "is not a list of different whole numbers"),
        ({"seeds": [[1]]}, "is not a list of different whole numbers"),
        ({"methods": {"x": 3}}, "needs `methods:`, a name for each"),
        ({"methods": {"x": {"against": 3}}}, "against of x=3 is unknown"),
        ({"evaluation": {"task_folder": "tasks"}}, "sets task_folder, which runs code that comes with tasks"),
        ({"seeds": [0.5]}, "is not a list of different whole numbers"),
        ({"learning_rates": ["fast"]}, "learning_rates=['fast'] is not a list of different numbers above 0"),
        ({"learning_rates": [0]}, "is not a list of different numbers above 0"),
        ({"learning_rates": [math.nan]}, "is not a list of different numbers above 0"),
        ({"learning_rates": [math.inf]}, "is not a list of different numbers above 0"),
        ({"learning_rates": [True]}, "is not a list of different numbers above 0"),
        ({"learning_rates": "12"}, "learning_rates='12' is not a list of different numbers above 0"),
        ({"learning_rates": {1: 2}}, "learning_rates={1: 2} is not a list of different numbers above 0"),
        ({"seeds": [0, 2**32]}, "seed=4294967296 is not allowed"),
        ({"methods": {"x" * 200: {}}}, "and take up to 100 signs"),
        ({"methods": {"../x": {}}}, "names a method '../x': begin it with a letter or a digit"),
        ({"budget": "joules"}, "budget='joules' is unknown: choose one of 'steps', 'seconds'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(tmp_path, {**SMALL, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ({"a": 1, "b": 2e-4, "c": "x"}, ["--a=1", "--b=0.0002", "--c=x"]),
        ({"a": True, "b": False, "c": None}, ["--a=true", "--b=false"]),
        ({"a": ["x", 2]}, ["--a", "x", "2"]),
        ({"a": {"b": 1}}, ['--a={"b": 1}']),
    ],
)
def test_flags_as_a_command_line(flags: dict[str, Any], arguments: list[str]) -> None:
    assert to_arguments(flags) == arguments


def test_options_of_the_command() -> None:
    options, rest = parse_options(["--recipe", "x", "--seeds", "1", "2", "--mu=3", "--evaluation", "tasks=a,b", "n=2"])
    assert (options.recipe, options.seeds, rest) == ("x", [1, 2], ["--mu=3"])
    assert [read_pair(text) for text in options.evaluation] == [("tasks", "a,b"), ("n", 2)]
    for arguments in (["--seeds", "x"], ["--budget", "joules"], ["--recipe"]):
        with pytest.raises(ValueError, match=rf"^{' '.join(arguments)} .*: give "):
            parse_options(arguments)
    with pytest.raises(ValueError, match="write it as name=value"):
        read_pair("tasks")


def test_names_of_the_librarys_comparisons(tmp_path: Path) -> None:
    assert find_comparison("quick") == find_comparison("compare-quick") == list_comparisons()[0]
    with pytest.raises(ValueError, match="There is no comparison 'nothing': give a YAML file, or one of quick"):
        find_comparison("nothing")


@pytest.mark.parametrize("file", list_comparisons(), ids=lambda file: file.stem)
def test_the_librarys_comparisons_fit_the_flags(file: Path) -> None:
    recipe = read_comparison(file, CPU)
    for method in recipe.methods:
        assert method.flags["model_name_or_path"]
        assert method.against or method.flags["method"] in ("peft", "random"), f"{method.name} is compared with nothing"


PAPER: dict[str, tuple[int, float, float, str]] = {
    "table2": (18, 2e-4, 10, "boolq"),
    "table3": (2, 1e-4, 100, "gsm8k"),
    "table4": (6, 2e-4, 10, "boolq"),
    "table5": (5, 2e-4, 10, "boolq"),
    "table10": (6, 2e-4, 10, "boolq"),
    "table11": (5, 2e-4, 10, "boolq"),
    "table12": (2, 2e-4, 10, "boolq"),
}
"""Rows, learning rate, mu where the table does not vary it, and the first task."""


def test_every_comparison_of_the_paper_is_in_the_table() -> None:
    assert {file.stem.removeprefix("compare-") for file in list_comparisons()} == {"quick", *PAPER}


@pytest.mark.parametrize("name", PAPER)
def test_what_the_paper_says(name: str) -> None:
    num_methods, rate, mu, task = PAPER[name]
    recipe = read_comparison(find_comparison(name), CPU)
    assert len(recipe.methods) == num_methods
    assert recipe.evaluation["tasks"][0] == task
    layers = {"7b": (32, 8), "13b": (40, 10), "6b": (28, 7), "7b1": (30, 8), "8B": (32, 8)}
    for method in recipe.methods:
        run = parse_arguments(recipe.arguments(method, 0, Path("run")))
        assert (run.training.learning_rate, run.training.warmup_steps, run.training.max_length) == (rate, 100, 256)
        assert run.training.completion_only_loss is False
        total, active = layers[method.flags["model_name_or_path"].rpartition("-")[2]]
        if name not in ("table4", "table5"):
            assert run.ist_config.layer_counts(total).active == active
        if name != "table10":
            assert run.ist_config.mu == mu
        if "adapter" not in method.flags:
            assert run.peft_config() is None or run.peft_config().r == 32
