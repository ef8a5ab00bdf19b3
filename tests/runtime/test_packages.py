"""What is missing is installed by the name that pip knows, which is not always the one that is imported."""

from __future__ import annotations

import ast
import re
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from ist.runtime.packages import (
    DISTRIBUTIONS,
    EXTRAS,
    distribution_of,
    how_to_install,
    is_of_python,
    say_how_to_install,
)

SOURCE = Path(__file__).parents[2] / "src" / "ist"
PLACE = "git+https://github.com/ist-peft/ist-peft"
WHERE_ALLOWED = {"runtime/packages.py", "cli/quickstart_model.py"}
"""The helper, and the wheel that is installed without what it needs."""


@pytest.mark.parametrize(
    ("module", "way"),
    [
        ("trl", f"pip install 'ist-peft[train] @ {PLACE}'"),
        ("yaml", f"pip install 'ist-peft[train] @ {PLACE}'"),
        ("lm_eval.models.huggingface", f"pip install 'ist-peft[eval] @ {PLACE}'"),
        ("matplotlib.pyplot", f"pip install 'ist-peft[report] @ {PLACE}'"),
        ("sklearn.metrics", "pip install scikit-learn"),
        ("PIL", "pip install Pillow"),
        ("google.protobuf", "pip install protobuf"),
        ("google.protobuf.message", "pip install protobuf"),
        ("cv2", "pip install opencv-python"),
        ("flash_attn.layers", "pip install flash-attn"),
        ("sentencepiece", "pip install sentencepiece"),
        ("comet_ml", "pip install comet-ml"),
    ],
)
def test_the_way_to_a_module(module: str, way: str) -> None:
    assert how_to_install(module) == way


def test_pages_install_this_library_from_where_messages_do() -> None:
    root = SOURCE.parents[1]
    pages = "".join(file.read_text(encoding="utf-8") for file in [root / "README.md", *(root / "docs").glob("*.md")])
    places = re.findall(r"pip install 'ist-peft\[[\w,]+\]( @ [^']*)?'", pages)
    assert len(places) >= 2
    assert {*places} == {f" @ {PLACE}"}


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("yaml", f"install it with pip install 'ist-peft[train] @ {PLACE}'"),
        ("cv2", "install it with pip install opencv-python"),
        ("flash_attn.layers", "install it with pip install flash-attn"),
        ("google.protobuf.message", "install it with pip install protobuf"),
        ("google", "install the package that brings google"),
        ("google.cloud", "install the package that brings google.cloud"),
        ("Crypto.Cipher", "install it with pip install pycryptodome"),
        ("serial", "install it with pip install pyserial"),
        ("ruamel.yaml", "install it with pip install ruamel.yaml"),
        ("my_helpers.texts", "install the package that brings my_helpers.texts"),
    ],
)
def test_an_unknown_module_is_not_laid_to_a_distribution_of_its_name(module: str, said: str) -> None:
    assert say_how_to_install(module) == said


def same(name: str) -> str:
    """A distribution's name as package indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_distributions_are_those_of_what_is_installed_here() -> None:
    installed = packages_distributions()
    found = [module for module in DISTRIBUTIONS if module in installed]
    assert "yaml" in found
    for module in found:
        assert same(distribution_of(module)) in map(same, installed[module]), module


def test_extras_exist() -> None:
    text = (SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for extra in EXTRAS.values():
        assert re.search(rf"^{extra} = \[", text, re.MULTILINE), extra


def test_what_comes_with_python_is_not_installed() -> None:
    assert is_of_python("_lzma")
    assert is_of_python("tkinter.ttk")
    assert not is_of_python("torch")


def test_no_message_has_advice_of_its_own() -> None:
    for file in sorted(SOURCE.rglob("*.py")):
        if file.relative_to(SOURCE).as_posix() in WHERE_ALLOWED:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "pip install" not in node.value, f"{file}, line {node.lineno}: use how_to_install"
