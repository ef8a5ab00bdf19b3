"""Coverage where it tells something: a plugin of pytest, of the tests themselves.

Before Python 3.12, measuring coverage makes a test take twice as long. Most cases of a parametrised test walk the same
lines with other numbers. Such a test is measured until several slow cases in a row bring no line that was not walked
before; its other cases run like every test, but unmeasured. So does the rest of a file after some more such cases. So
the reported coverage is a lower bound.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

MAX_BARREN = 2
"""So many slow cases in a row without a new line end the measuring of their test."""
SLOW = 0.1
"""Seconds of processor time. Quick cases, such as those of tables of errors, end nothing: they cost little."""
MAX_BARREN_OF_FILE = 4
"""So many, of whichever tests, end it for the rest of their file."""
barren: Counter[str] = Counter()


def lines_walked() -> int | None:
    """How many lines were walked up to now; None where no coverage is measured."""
    coverage: Any = sys.modules.get("coverage")
    current = coverage and coverage.Coverage.current()
    collector = getattr(current, "_collector", None)  # asking `get_data` writes a file each time
    return collector and sum(map(len, collector.data.copy().values()))


@contextmanager
def unmeasured() -> Iterator[None]:
    """Stop every measuring of this process, and start it again.

    pytest-cov's own `no_cover` stops one. In a process of pytest-xdist two are on, one around the other (pytest-cov
    7.1), and the one that is left takes as long as both.
    """
    coverage: Any = sys.modules["coverage"]
    stopped = []
    while (current := coverage.Coverage.current()) is not None:
        current.stop()
        stopped.append(current)
    try:
        yield
    finally:
        for current in reversed(stopped):
            current.start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    before = lines_walked() if item.config.pluginmanager.hasplugin("_cov") else None
    if before is None:
        return (yield)
    file, test = item.nodeid.partition("::")[0], item.nodeid.partition("[")[0]
    limits = {file: MAX_BARREN_OF_FILE}
    if hasattr(item, "callspec"):
        limits[test] = MAX_BARREN
    if any(barren[key] >= limit for key, limit in limits.items()):
        with unmeasured():
            return (yield)
    start = time.process_time()
    result = yield
    if (lines_walked() or 0) > before:
        for key in limits:
            barren[key] = 0
    elif time.process_time() - start > SLOW:
        barren.update(limits.keys())
    return result
