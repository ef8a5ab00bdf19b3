"""The pages agree with the code and with each other: links lead somewhere, and quoted messages are the library's."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from ist import ISTConfig
from ist.cli.eval.arguments import known_eval_flags
from ist.cli.main import COMMANDS
from ist.cli.train.arguments import known_flags
from ist.method.registry import SELECTORS
from ist.method.spreading import SPREADS
from ist.probing.criteria import CRITERIA

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"


def links(text: str) -> list[str]:
    """Relative links, without those in code."""
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def messages(text: str) -> list[str]:
    """What stands in code in the first column of the tables."""
    return re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)


def source_strings() -> list[str]:
    """Every string of the library, with `·` for the values in it."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "·" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%\S?\w", "·", node.value))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_of_docs_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in readme]
    assert missing == []


def test_a_page_has_one_title_and_begins_with_it() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert re.findall(r"^# ", text, re.MULTILINE) == ["# "], page
        assert text.startswith("# "), page


def test_messages_to_look_up_are_the_librarys() -> None:
    """`…` stands for any value."""
    strings = source_strings()
    quoted = messages(TROUBLESHOOTING.read_text(encoding="utf-8"))
    assert len(quoted) > 30
    for message in quoted:
        parts = [part.strip() for part in message.split("…")]
        candidates = [string for string in strings if all(part in string for part in parts)]
        pattern = re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)
        assert any(pattern.search(string) for string in candidates), message


def test_no_program_masks_the_end_with_the_padding() -> None:
    """transformers' collator for texts leaves the end out of the loss where it pads too, and answers never end."""
    masking = re.compile(r"DataCollatorForLanguageModeling\(")
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.py")]
    assert [file.name for file in files if masking.search(file.read_text(encoding="utf-8"))] == []


def test_files_of_a_run_that_the_pages_name_are_the_librarys() -> None:
    strings = source_strings()
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        named = set(re.findall(r"`(?:[^`\s]*/)?(ist_\w+\.\w+)`", page.read_text(encoding="utf-8")))
        assert sorted(file for file in named if file not in strings) == [], page.name


def shown_commands() -> list[tuple[str, list[str]]]:
    """Every `ist …` of the pages' code blocks, with the page's name."""
    found = []
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, shlex.split(line, comments=True)) for line in lines if line.startswith("ist ")]
    return found


def test_commands_of_the_pages_have_flags_that_exist() -> None:
    training = {*known_flags(), "recipe", "trust_recipe", "help", "help_all", "FLAG"}
    more = {"train": set(), "compare": {"seeds", "methods", "budget", "evaluation"}, "analyse": {"order"}}
    commands = shown_commands()
    assert len(commands) > 12
    for page, (_, command, *arguments) in commands:
        flags = {argument[2:].partition("=")[0].replace("-", "_") for argument in arguments if argument[:2] == "--"}
        allowed = known_eval_flags() if command == "eval" else training | more.get(command, set())
        assert command in COMMANDS, (page, command)
        assert not flags - allowed, (page, command, flags - allowed)


def in_code(page: str) -> set[str]:
    """Every word in a code span of a page, without quotes."""
    spans = re.findall(r"`([^`\n]+)`", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    return {span.strip('"') for span in spans}


def test_the_guide_has_every_option() -> None:
    missing = {field.name for field in dataclasses.fields(ISTConfig)} - in_code("guide.md")
    assert not missing


def test_the_baselines_have_every_selector() -> None:
    assert not {*SELECTORS} - in_code("baselines.md")


def test_the_page_of_focused_training_has_every_criterion_and_spread() -> None:
    assert not {*CRITERIA, *SPREADS} - in_code("focused.md")
