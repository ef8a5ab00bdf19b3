"""The parser of `ist train`'s flags: TRL's, with the help of this library's fields and errors of one line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

from trl import TrlParser

__all__ = ["FlagParser"]


class FlagParser(TrlParser):
    """Flags made from dataclasses.

    Args:
        dataclass_types: what the flags are made from.
        texts: help of flags whose dataclass has none.
    """

    def __init__(self, dataclass_types: Sequence[type], texts: Mapping[str, str]) -> None:
        super().__init__(cast("Any", dataclass_types), prog="ist train", allow_abbrev=False, add_help=False)
        for action in self._actions:
            if isinstance(action, argparse._StoreFalseAction):  # `--no_x`, which transformers adds with the help of x
                action.help = f"Turns --{action.dest} off."
            else:
                action.help = texts.get(action.dest, action.help)

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with a message of one line, not a page of usage."""
        raise ValueError(message)

    def flags(self) -> set[str]:
        """Every key that a recipe may have and every flag without its dashes."""
        return {action.dest for action in self._actions}
