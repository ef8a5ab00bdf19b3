"""Flags made from a dataclass: names, types and defaults are its fields', the help is the fields' docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["field_docstrings", "flags_of", "parse_number", "values_of"]


@cache
def field_docstrings(owner: type) -> Mapping[str, str]:
    """The text below each field of a dataclass, on one line; those of its bases count, and its own go over them.

    Empty where Python has no source of the class.
    """
    texts: dict[str, str] = {}
    for part in reversed(owner.__mro__):
        if not dataclasses.is_dataclass(part):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
        except OSError:
            continue
        assert isinstance(tree, ast.ClassDef)
        for statement, after in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = ast.unparse(after.value) if isinstance(after, ast.Expr) else ""
                value = ast.literal_eval(text) if text[:1] in ("'", '"') else None
                if isinstance(value, str):
                    texts[statement.target.id] = " ".join(value.split())
    return texts


def flags_of(owner: type, name: str, without: tuple[str, ...] = ()) -> type:
    """A dataclass for the command line with the fields of another one.

    A choice of words becomes a text, and a number that may be a count or a fraction too, since a parser of flags knows
    one type for each; `values_of` undoes it, and `owner` checks the values.

    Args:
        owner: a dataclass whose fields have defaults.
        name: of the new class.
        without: fields that are left out.
    """
    hints = get_type_hints(owner)
    fields = []
    for field in dataclasses.fields(owner):
        if field.name not in without:
            kind = flag_type(hints[field.name])
            default = str(field.default) if kind is str else field.default
            fields.append((field.name, kind, dataclasses.field(default=default)))
    return dataclasses.make_dataclass(name, fields)


def values_of(flags: Any, owner: type) -> dict[str, Any]:
    """The keywords for `owner` that parsed flags hold.

    Raises:
        ValueError: a text that should be a number is none.
    """
    hints = get_type_hints(owner)
    values = {}
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        number = {int, float} <= set(get_args(hints[field.name]))
        values[field.name] = parse_number(field.name, value) if number else value
    return values


def flag_type(hint: Any) -> Any:
    """The type that a flag has for a field of the type `hint`."""
    if get_origin(hint) is Literal:
        return str
    if get_origin(hint) not in (Union, UnionType):
        return hint
    members = [flag_type(member) for member in get_args(hint) if member is not type(None)]
    kind = members[0] if len(set(members)) == 1 else str
    return kind | None if type(None) in get_args(hint) else kind


def parse_number(name: str, value: str) -> int | float:
    """A count from `8`, a fraction from `0.25`.

    Raises:
        ValueError: the text is not a number.
    """
    for kind in (int, float):
        try:
            return kind(value)
        except (ValueError, TypeError):
            continue
    raise ValueError(f"{name}={value!r} is not a number: write 8 for a count of 8, or 0.25 for a quarter.")
