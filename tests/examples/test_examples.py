"""The examples of the documentation run and do what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_plain_loop_learns() -> None:
    main = runpy.run_path(str(EXAMPLES / "plain_loop.py"))["main"]
    first, last = main()
    assert last < 0.5 * first
