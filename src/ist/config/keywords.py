"""Keywords that a function does not take: named with the nearest one that it takes, and all others."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

__all__ = ["keywords_of", "nearest", "unknown_keywords", "with_checked_keywords"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

COUNT = re.compile("(n|nr|num|number)_")
"""How names of counts begin elsewhere; here they begin with `num_`."""


def keywords_of(function: Callable[..., Any]) -> list[str]:
    """The names of the arguments that a function, or a class's constructor, takes as keywords."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, parameter in inspect.signature(function).parameters.items() if parameter.kind in by_name]


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that is most like another, or None where none is like it.

    For a count, such as `n_layers`, a name `num_*` that shares a word with it comes first.
    """
    names = sorted(allowed)
    words = name.split("_")[1:] if COUNT.match(name) else []
    counts = [other for other in names if other.startswith("num_") and any(f"_{word}" in other for word in words)]
    found = difflib.get_close_matches(name, counts, n=1, cutoff=0.5) or difflib.get_close_matches(name, names, n=1)
    return next(iter(found), None)


def unknown_keywords(what: str, given: Iterable[str], allowed: Sequence[str]) -> str | None:
    """The message where keywords are given to `what` that are not among those allowed; None where all are."""
    unknown = [name for name in given if name not in allowed]
    if not unknown:
        return None
    meant = list(dict.fromkeys(near for name in unknown if (near := nearest(name, allowed))))
    hint = f"did you mean {' and '.join(meant)}? Its" if meant else "its"
    return f"Unknown option {', '.join(unknown)} of {what}: {hint} options are {', '.join(allowed)}."


def with_checked_keywords(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function whose TypeError for an unknown keyword says which one was meant, and which there are."""
    allowed = keywords_of(function)

    @wraps(function)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if message := unknown_keywords(function.__name__, kwargs, allowed):
            raise TypeError(message)
        return function(*args, **kwargs)

    return checked
