"""The parser of `ist train`'s flags: TRL's, with the help of this library's fields and errors of one line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, cast

from trl import TrlParser

from ..parsing import OneLineParser

__all__ = ["FlagParser"]


class FlagParser(OneLineParser, TrlParser):
    """Flags made from dataclasses.

    Args:
        dataclass_types: what the flags are made from.
        texts: help of flags whose dataclass has none.
    """

    help_command = "ist train --help-all"

    def __init__(self, dataclass_types: Sequence[type], texts: Mapping[str, str]) -> None:
        super().__init__(cast("Any", dataclass_types), prog="ist train", allow_abbrev=False, add_help=False)
        for action in self._actions:
            if isinstance(action, argparse._StoreFalseAction):  # `--no_x`, which transformers adds with the help of x
                action.help = f"Turns --{action.dest} off."
            else:
                action.help = texts.get(action.dest, action.help)
