"""Messages of the library, which name its keywords, in the words of somebody who typed flags."""

from __future__ import annotations

import re

__all__ = ["in_flags"]

FLAG_OF = {
    "num_layers": "num_focused_layers",
    "criterion": "focus_criterion",
    "spread": "focus_spread",
    "selector": "method",
    "non_linearity": "bottleneck_non_linearity",
}
"""Keywords whose flag of `ist train` has another name."""

KEYWORD = re.compile(
    rf"(?<![\w/\\.-])({'|'.join(FLAG_OF)})=(?:'([^']*)'|\"([^\"]*)\"|([\w.+-]*[\w+-]))(?![\w.+-]*[\w/\\])"
)
"""A keyword with its value, which is no part of a path."""


def in_flags(text: str) -> str:
    """A message in which `num_layers=9` reads `--num_focused_layers 9`, and `selector='random'` `--method random`."""
    return KEYWORD.sub(lambda match: f"--{FLAG_OF[match[1]]} {next(filter(None, match.groups()[1:]), '')}", text)
