"""Coverage where it tells something: a plugin of pytest, of the tests themselves.

Before Python 3.12, measuring coverage makes a test take 1.6 times as long. Most cases of a parametrised test walk the
same lines with other numbers. Such a test is measured until several slow cases in a row bring no line that was not
walked before; its other cases run like every test, but unmeasured. So the reported coverage is a lower bound.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest

MAX_BARREN = 2
"""So many slow cases in a row without a new line end the measuring of their test."""
SLOW = 0.1
"""Seconds of processor time. Quick cases, such as those of tables of errors, end nothing: they cost little."""
barren: Counter[str] = Counter()


def lines_walked() -> int | None:
    """How many lines were walked up to now; None where no coverage is measured."""
    coverage: Any = sys.modules.get("coverage")
    current = coverage and coverage.Coverage.current()
    collector = getattr(current, "_collector", None)  # asking `get_data` writes a file each time
    return collector and sum(map(len, collector.data.copy().values()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    measured = hasattr(item, "callspec") and item.config.pluginmanager.hasplugin("_cov")
    before = lines_walked() if measured else None
    if before is None:
        return (yield)
    test = item.nodeid.partition("[")[0]
    if barren[test] >= MAX_BARREN:
        item.add_marker("no_cover")  # of pytest-cov
        return (yield)
    start = time.process_time()
    result = yield
    if (lines_walked() or 0) > before:
        barren[test] = 0
    elif time.process_time() - start > SLOW:
        barren[test] += 1
    return result
