"""The package itself: what it exports, and that importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import ist


def test_importing_ist_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "peft", "accelerate", "trl", "datasets", "numpy", "matplotlib", "rich")
    code = f"import sys, ist; ist.__version__; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize("name", ist.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(ist, name)
    assert name in dir(ist)
    if name != "__version__":
        assert value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Ist'"):
        ist.Ist  # noqa: B018


def test_the_version_is_that_of_the_distribution() -> None:
    assert version("ist-peft") == ist.__version__


def test_the_core_imports_torch_alone() -> None:
    code = (
        "import sys, ist.adapters.layers, ist.config, ist.method.sampling, ist.method.importance, ist.probing.probes;"
        "import ist.runs.history, ist.step.activation;"
        "print([name for name in ('transformers', 'peft', 'accelerate') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
