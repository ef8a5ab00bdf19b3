"""The flags of `ist train` are `ISTConfig`'s fields, their help is the fields' docstrings, old names still work."""

from __future__ import annotations

import dataclasses
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from ist import ISTConfig
from ist.cli.compare.recipe import read_comparison
from ist.cli.compare.runs import check_same
from ist.cli.main import main
from ist.cli.recipes.renamed import FLAGS, VALUES, rename_arguments, rename_keys
from ist.cli.train.arguments import ISTArguments, known_flags, make_parser, parse_arguments
from ist.cli.train.help import COMMON, HELP_TEXTS, MEANINGS, format_help
from ist.cli.train.methods import METHODS
from ist.cli.train.options import field_docstrings, flags_of, values_of

RUN = ["--model_name_or_path=x", "--task=word-problems", "--bf16=false", "--use_cpu"]


# ---- Flags from fields


@dataclass(kw_only=True)
class Base:
    """A base."""

    count: int | float = 0.5
    """How many. A count, or
    a `fraction`."""

    plain: int = 3


@dataclass(kw_only=True)
class Example(Base):
    """An example."""

    word: Literal["a", "b"] = "a"
    """A word."""
    "Another text."

    choice: Literal["a", "b"] | None = None
    """A choice."""

    sure: bool = True
    size: int | None = None
    left: int = 0


def test_docstrings_of_fields_are_found_and_those_of_bases_count() -> None:
    assert field_docstrings(Example) == {
        "count": "How many. A count, or a `fraction`.",
        "word": "A word.",
        "choice": "A choice.",
    }


def test_a_class_without_source_has_no_docstrings() -> None:
    assert field_docstrings(dataclasses.make_dataclass("Made", [("x", int)])) == {}


def test_flags_have_the_fields_names_defaults_and_one_type() -> None:
    made = flags_of(Example, "Made", without=("left",))
    found = {field.name: (field.type, field.default) for field in dataclasses.fields(made)}
    assert found == {
        "count": (str, "0.5"),
        "plain": (int, 3),
        "word": (str, "a"),
        "choice": (str | None, None),
        "sure": (bool, True),
        "size": (int | None, None),
    }


@pytest.mark.parametrize(("text", "value"), [("8", 8), ("0.25", 0.25), ("1e0", 1.0)])
def test_a_number_is_a_count_or_a_fraction(text: str, value: float) -> None:
    found = values_of(flags_of(Example, "Made")(count=text), Example)["count"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["few", "", "1/2"])
def test_a_text_that_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"count={text!r} is not a number: write 8")):
        values_of(flags_of(Example, "Made")(count=text), Example)


def test_every_option_is_a_flag_with_the_same_default_and_its_docstring() -> None:
    config = parse_arguments([*RUN, "--seed=0"]).ist_config
    assert config == ISTConfig()
    texts = {action.dest: action.help for action in reversed(make_parser()._actions)}
    for field in dataclasses.fields(ISTConfig):
        assert field.name in known_flags()
        assert field.name == "seed" or texts[field.name] == field_docstrings(ISTConfig)[field.name]


def test_every_flag_of_this_library_has_a_docstring() -> None:
    for owner in (ISTConfig, ISTArguments):
        assert {field.name for field in dataclasses.fields(owner)} == set(field_docstrings(owner))


# ---- Help


def shown(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *flags])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--help"], ["-h"], ["--recipe=quickstart", "--help"]], ids=" ".join)
def test_help_is_one_page_of_the_common_flags(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    page = shown(capsys, *flags)
    listed = re.findall(r"^  --(\w+)", page, flags=re.MULTILINE)
    assert listed == [name for names in COMMON.values() for name in names]
    assert all(f"\n{title}:\n" in page for title in COMMON)
    assert len(page.splitlines()) < 120
    text = " ".join(page.split())
    assert "(default: 0.25)" in text
    assert "10 by default, the paper's for some 30,000 steps; give 100 for short trainings" in text
    assert f"--help-all` lists all {len(known_flags())} flags" in text


def test_help_explains_every_method() -> None:
    assert set(MEANINGS["method"]) == set(METHODS)
    for width in (60, 80, 110):
        page = format_help(make_parser(), everything=False, width=width)
        for method, meaning in MEANINGS["method"].items():
            (found,) = re.findall(rf"^      {method} +(\S.*\n(?:^ {{26}}\S.*\n)*)", page, flags=re.MULTILINE)
            assert " ".join(found.split()) == meaning


@pytest.mark.parametrize("flag", ["--help-all", "--help_all"])
def test_help_all_has_every_flag_once(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    page = shown(capsys, flag)
    listed = re.findall(r"^  --(\w+)", page, flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert {name for name in listed if not name.startswith("no_")} == known_flags()
    whole = field_docstrings(ISTConfig)["num_active_layers"].replace("`", "")
    assert whole in " ".join(page.split())


def test_a_flag_that_turns_another_one_off_has_its_own_text() -> None:
    page = format_help(make_parser(), everything=True)
    assert re.search(r"^  --no_fused +Turns --fused off\.$", page, flags=re.MULTILINE)
    text = field_docstrings(ISTConfig)["fused"].replace("`", "")
    assert " ".join(page.split()).count(text) == 1


def test_lines_of_help_fit_the_terminal() -> None:
    for everything in (False, True):
        for width in (60, 80, 200):
            lines = format_help(make_parser(), everything, width).splitlines()
            assert max(len(line) for line in lines if " " in line.strip()) <= max(96, min(width, 110))


def test_the_texts_are_of_flags_that_exist() -> None:
    assert set(HELP_TEXTS) <= known_flags()


# ---- Old names


def test_old_names_lead_to_flags_that_exist() -> None:
    assert set(FLAGS.values()) <= known_flags()
    assert not set(FLAGS) & known_flags()
    for (flag, old), new in VALUES.items():
        assert old != new
        parse_arguments([*RUN, f"--{flag}={new}"])


OLD = [
    *(([f"--{old}=1"], [f"--{new}=1"], f"--{old} is now --{new}") for old, new in FLAGS.items()),
    *(([f"--{old}", "1"], [f"--{new}", "1"], f"--{old} is now --{new}") for old, new in FLAGS.items()),
    *(([f"--{f}={old}"], [f"--{f}={new}"], f"--{f} {old} is now --{f} {new}") for (f, old), new in VALUES.items()),
    *(([f"--{f}", old], [f"--{f}", new], f"--{f} {old} is now --{f} {new}") for (f, old), new in VALUES.items()),
]


@pytest.mark.parametrize(("old", "new", "said"), OLD, ids=lambda value: " ".join(value))
def test_an_old_name_on_the_command_line(old: list[str], new: list[str], said: str) -> None:
    assert rename_arguments([*RUN, *old, "--lora_r", "4"]) == ([*RUN, *new, "--lora_r", "4"], [said])


def test_present_names_stay() -> None:
    arguments = [*RUN, "--recompute=all", "--layers", "all", "--data_files", "all", "reference"]
    assert rename_arguments(arguments) == (arguments, [])
    assert rename_keys({"recompute": "all", "max_steps": 3}) == ({"recompute": "all", "max_steps": 3}, [])


def test_an_old_name_is_one_line_of_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ist.cli"):
        assert parse_arguments([*RUN, "--method", "all"]).ist.method == "peft"
    assert caplog.messages == [
        "the command line: --method all is now --method peft; the old names end with version 0.2."
    ]


def test_an_old_name_in_a_recipe(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine.yaml").write_text("task: word-problems\nmethod: all\nbf16: false\n")
    assert parse_arguments(["--recipe", str(tmp_path / "mine.yaml")]).ist.method == "peft"
    assert caplog.messages == ["mine.yaml: method: all is now method: peft; the old names end with version 0.2."]


def test_old_names_in_a_comparison_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine.yaml").write_text(
        "methods: {a: {method: all}, b: {method: all}, c: {}}\nflags: {task: word-problems, bf16: false, use_cpu: true}"
    )
    comparison = read_comparison(tmp_path / "mine.yaml")
    assert [method.flags.get("method") for method in comparison.methods] == ["peft", "peft", None]
    assert comparison.methods[2].against == ("a", "b")
    assert len(caplog.messages) == 1


def test_an_old_and_a_new_name_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FLAGS, "rank", "lora_r")
    for flags in ({"rank": 1, "lora_r": 2}, {"lora_r": 2, "rank": 1}):
        with pytest.raises(ValueError, match="rank is the old name of lora_r, and both are given"):
            rename_keys(flags)


def test_a_run_that_began_under_an_old_name_goes_on(tmp_path: Path) -> None:
    check_same(["--method=all"], ["--method=peft"], tmp_path)
    with pytest.raises(ValueError, match="other flags"):
        check_same(["--method=all"], ["--method=ist"], tmp_path)
