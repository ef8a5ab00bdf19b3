"""Coverage where it tells something: a plugin of pytest, of the tests themselves.

Before Python 3.12, measuring coverage makes a test take 1.6 times as long. Most cases of a parametrised test walk the
same lines with other numbers. Such a test is measured until some of its cases in a row bring no line that was not
walked before; its other cases run like every test, but unmeasured. What is reported is therefore a lower bound.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

MAX_BARREN = 2
"""So many cases in a row without a new line end the measuring of their test."""
barren: Counter[str] = Counter()


def lines_walked() -> int | None:
    """How many lines were walked up to now; None where no coverage is measured."""
    coverage: Any = sys.modules.get("coverage")
    current = coverage and coverage.Coverage.current()
    collector = getattr(current, "_collector", None)  # asking `get_data` writes a file each time
    return collector and sum(map(len, collector.data.values()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = lines_walked() if hasattr(item, "callspec") else None
    if before is None:
        return (yield)
    test = item.nodeid.split("[")[0]
    if barren[test] >= MAX_BARREN:
        item.add_marker("no_cover")  # of pytest-cov
        return (yield)
    result = yield
    barren[test] = 0 if (lines_walked() or 0) > before else barren[test] + 1
    return result
