"""Flags that say how answers to a user's own rows are marked, alike in `ist eval` and `ist train`.

A metric of the user's own, `FILE.py:FUNCTION` or `MODULE:FUNCTION`, comes from the command line alone, since it runs.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..experiments.evaluation.metrics import UserMetric
from ..runtime.packages import say_how_to_install

__all__ = ["check_marks", "load_metric"]


def check_marks(metric: str | None, labels: Sequence[str] | None, function: str | None) -> None:
    """Raise ValueError where `--metric`, `--labels` and `--metric_function` do not go together."""
    if function and (metric or labels):
        other = "metric" if metric else "labels"
        raise ValueError(f"--{other} and --metric_function given: answers are marked by one of them.")
    if labels and metric != "label_accuracy":
        raise ValueError("--labels are for --metric label_accuracy: add it.")


def load_metric(text: str) -> UserMetric:
    """Import the function that a flag names.

    Raises:
        ValueError: the text has another form, or the function cannot be imported.
    """
    source, colon, name = text.rpartition(":")
    if not colon or not source or not name.isidentifier():
        raise ValueError(f"--metric_function {text} is neither FILE.py:FUNCTION nor MODULE:FUNCTION.")
    try:
        module = load_file(Path(source).expanduser()) if source.endswith(".py") else load_module(source)
    except FileNotFoundError as error:
        raise ValueError(f"--metric_function {text}: {source} is not a file.") from error
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        way_out = "."
        if isinstance(error, ModuleNotFoundError) and error.name and top(error.name) != top(source):
            way_out = f": put it beside {source}, or {say_how_to_install(error.name)}."
        raise ValueError(
            f"--metric_function {text} cannot be imported ({type(error).__name__}: {said}){way_out}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--metric_function {text}: {source} has no function {name}.")
    file = getattr(module, "__file__", None)
    digest = hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest() if file else ""
    return UserMetric(function, text, digest)


def top(name: str) -> str:
    """The first part of a name with dots."""
    return name.partition(".")[0]


def load_file(file: Path) -> Any:
    """A Python file as a module; what lies beside it can be imported by it."""
    if not file.is_file():
        raise FileNotFoundError(file)
    spec = importlib.util.spec_from_file_location(f"ist_metric_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        with importable(file.parent):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    return module


def load_module(name: str) -> Any:
    """A module by its name, from this folder too."""
    with importable(Path.cwd()):
        return importlib.import_module(name)


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Imports look into a folder too."""
    place = str(folder.resolve())  # once: what is imported may change the current folder, and this list
    sys.path.insert(0, place)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(place)
