"""The package itself: what it exports, and that importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import ist

SOURCE = Path(ist.__file__).parent
FLOORS = [
    {"adalora", "adapterhub", "checkpoints", "config", "data", "ddp", "distributed", "history", "importance"}
    | {"layers", "lora_fa", "probes", "resume", "sampling", "scores", "sharding", "statistics"}
    | {"whole_layers"},
    {
        "activation",
        "announce",
        "comparison",
        "compiled",
        "fingerprint",
        "fused",
        "optimizer_state",
        "recompute",
        "responses",
    },
    {"depth", "joint", "suppression"},
    {"analysis", "evaluation", "measurement", "selectors"},
    {"tuner"},
    {"greedy", "integrations"},
    {"cli"},
]


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


@pytest.mark.parametrize("floor", range(1, len(FLOORS)))
def test_no_import_goes_upwards(floor: int) -> None:
    """The rooms stand on floors, and a room imports from its own floor or from below."""
    above = set().union(*FLOORS[floor:])
    for room in FLOORS[floor - 1]:
        path = SOURCE / room
        for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
            imports = [
                line.split()[1].lstrip(".") for line in file.read_text().splitlines() if line.startswith("from .")
            ]
            upwards = [name for name in imports if name.split(".")[0] in above]
            assert not upwards, f"{file.name} imports {upwards}"


def test_the_core_imports_torch_alone() -> None:
    code = (
        "import sys, ist.layers, ist.config, ist.sampling, ist.importance, ist.probes, ist.history, ist.activation;"
        "print([name for name in ('transformers', 'peft', 'accelerate') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
