"""The files around the code agree with each other: workflows, versions, make targets, hooks, citation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
YAML_FILES = [
    *WORKFLOWS,
    *sorted((ROOT / ".github").glob("*.yml")),
    *sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")),
    *sorted((ROOT / "examples").rglob("*.yaml")),
    *sorted((ROOT / "recipes").glob("*.yaml")),
    ROOT / ".pre-commit-config.yaml",
    ROOT / "CITATION.cff",
]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = PYPROJECT["project"]
USER_EXTRAS = ("train", "report", "eval", "quickstart")


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text())


def workflow(name: str) -> Any:
    return read(ROOT / ".github" / "workflows" / f"{name}.yml")


def steps(file: Path) -> list[dict[str, Any]]:
    return [step for job in read(file)["jobs"].values() for step in job.get("steps", [])]


def requirements(*extras: str) -> dict[str, Requirement]:
    texts = [*PROJECT["dependencies"], *(text for name in extras for text in PROJECT["optional-dependencies"][name])]
    parsed = [Requirement(text) for text in texts]
    return {requirement.name: requirement for requirement in parsed if requirement.name != PROJECT["name"]}


def version_in(requirement: Requirement, operator: str) -> Version:
    """The version in `name>=1.2` or `name==1.2`."""
    (text,) = [specifier.version for specifier in requirement.specifier if specifier.operator == operator]
    return Version(text)


@pytest.mark.parametrize("file", YAML_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_each_yaml_file_is_a_mapping(file: Path) -> None:
    assert isinstance(read(file), dict)


def test_the_workflows_are_there() -> None:
    assert [file.stem for file in WORKFLOWS] == ["ci", "nightly", "release", "tests"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_has_a_name_a_trigger_and_few_rights(file: Path) -> None:
    content = read(file)
    assert content["name"] == file.stem
    assert content[True], "`on` is the key that YAML reads as true"
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        assert "uses" in job or job["timeout-minutes"] <= 180, name


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_actions_are_pinned_by_commit(file: Path) -> None:
    for step in steps(file):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), step["uses"]


def test_an_action_has_one_pin() -> None:
    pins = {step["uses"] for file in WORKFLOWS for step in steps(file) if "uses" in step}
    assert len({pin.split("@")[0] for pin in pins}) == len(pins), sorted(pins)


def test_the_matrix_has_the_supported_versions_of_python() -> None:
    prefix = "Programming Language :: Python :: 3."
    supported = [text.split(" :: ")[-1] for text in PROJECT["classifiers"] if text.startswith(prefix)]
    matrix = workflow("tests")["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == supported
    assert PROJECT["requires-python"] == f">={supported[0]}"
    assert matrix["dependencies"] == ["lowest", "newest"]


def test_each_constraint_file_of_the_matrix_exists() -> None:
    included = workflow("tests")["jobs"]["tests"]["strategy"]["matrix"]["include"]
    constraints = [entry["constraint"] for entry in included if "constraint" in entry]
    assert constraints == ["constraints/lowest.txt"]
    assert (ROOT / constraints[0]).is_file()


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    lines = (ROOT / "constraints" / "lowest.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    bounds = requirements(*USER_EXTRAS)
    assert {pin.name: version_in(pin, "==") for pin in pins} == {
        name: version_in(bound, ">=") for name, bound in bounds.items()
    }


def named_targets(text: str) -> set[str]:
    """The targets of `make …` at the start of a line or in backquotes; variables and options are left out."""
    commands = re.findall(r"(?:^|run: |`)make ((?:[a-z][a-z-]* ?)+)", text, re.MULTILINE)
    return {target for command in commands for target in command.split()}


@pytest.mark.parametrize(
    "file",
    [*WORKFLOWS, *(ROOT / name for name in (".ci/run", "Makefile", "README.md", "CONTRIBUTING.md", "pyproject.toml"))],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_each_make_target_that_is_named_exists(file: Path) -> None:
    rules = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named_targets(file.read_text()) <= rules


def test_the_make_targets_of_the_workflows() -> None:
    included = workflow("tests")["jobs"]["tests"]["strategy"]["matrix"]["include"]
    rules = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {entry["target"] for entry in included if "target" in entry} <= rules
    assert named_targets((ROOT / ".github" / "workflows" / "nightly.yml").read_text()) == {
        "test-nightly",
        "test-adapterhub",
    }
    assert any(step.get("run") == "bash .ci/run" for step in steps(ROOT / ".github" / "workflows" / "ci.yml"))


def test_a_release_is_checked_and_only_its_last_job_may_publish() -> None:
    jobs = workflow("release")["jobs"]
    commands = [step.get("run", step.get("uses", "")).split("@")[0] for step in jobs["build"]["steps"]]
    order = ["python -m build", "python -m twine check --strict dist/*", "actions/upload-artifact"]
    assert [command for command in commands if command in order] == order
    assert jobs["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert "workflow_call" in workflow("ci")[True]
    assert jobs["publish"]["needs"] == ["ci", "build"]
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]


def test_the_hooks_have_the_version_of_ruff_and_need_no_environment() -> None:
    hooks = {repo["repo"].rsplit("/", 1)[-1]: repo["rev"] for repo in read(ROOT / ".pre-commit-config.yaml")["repos"]}
    (ruff,) = [text for text in PROJECT["optional-dependencies"]["dev"] if text.startswith("ruff==")]
    assert hooks["ruff-pre-commit"] == f"v{ruff.removeprefix('ruff==')}"
    assert ".venv/" not in (ROOT / ".pre-commit-config.yaml").read_text()
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", rev) for rev in hooks.values())


def test_the_citation_is_of_the_paper_and_of_this_project() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert citation["preferred-citation"]["url"] == PROJECT["urls"]["Paper"]
    assert PROJECT["urls"]["Paper"] in (ROOT / "README.md").read_text()
    assert [person["family-names"] for person in citation["preferred-citation"]["authors"]] == [
        "Yao", "Gao", "Li", "Zhao", "Wang", "Wang", "Zhu",
    ]  # fmt: skip


def test_the_project_has_one_address() -> None:
    """Every link to a repository of this name is one to the repository of pyproject.toml."""
    files = [
        ROOT / "README.md",
        ROOT / "SECURITY.md",
        ROOT / "CITATION.cff",
        *(ROOT / "docs").rglob("*.md"),
        *YAML_FILES,
    ]
    found = {
        address
        for file in [*files, ROOT / "pyproject.toml"]
        for address in re.findall(rf"https://github\.com/[\w-]+/{PROJECT['name']}\b", file.read_text())
    }
    assert found == {PROJECT["urls"]["Repository"]}


@pytest.mark.slow
def test_tests_have_the_same_names_in_every_process() -> None:
    """pytest-xdist refuses to run where its processes collect others: a set's order, the time and addresses differ."""
    collecting = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in "12"
    ]
    names = [process.communicate()[0].splitlines() for process in collecting]
    assert [process.returncode for process in collecting] == [0, 0], names
    first, second = [[name for name in found if "::" in name] for found in names]
    assert len(first) > 5000
    assert second == first
