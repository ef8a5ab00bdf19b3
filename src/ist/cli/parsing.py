"""A parser of flags whose errors are one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

__all__ = ["OneLineParser"]


class OneLineParser(argparse.ArgumentParser):
    """An error is one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with a message of one line."""
        raise ValueError(f"{message}; `{self.prog} --help` lists the flags.")
