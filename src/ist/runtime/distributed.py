"""Several processes that train one model choose the same layers and learn the same importance.

The choice needs no message: it depends on seed, step and scores alone (`ist.method.sampling`). Two small things are
sent: the losses of candidate sets, averaged so that every rank learns from the whole batch, and what all ranks must
have in common. Ranks that disagree, or that do not come, end with an error on each of them, which names them; without
it they would wait for each other's gradients for long.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist

from .exchange import Exchange

__all__ = ["Ranks", "current_exchange", "current_ranks"]

MAX_SHOWN = 200
"""Characters of a rank's value in an error message."""

_exchanges: dict[Any, Exchange] = {}
"""The exchange of the current default group."""


class Ranks:
    """The processes that train together; alone where torch.distributed is not in use.

    Every method but the properties is a collective: all ranks have to call it, in the same order. Each raises
    ValueError, on every rank, where a rank does not come, or calls another one.

    Args:
        exchange: between the processes, or None for a process alone.
    """

    def __init__(self, exchange: Exchange | None = None) -> None:
        self._exchange = exchange
        self.size: int = 1 if exchange is None else exchange.size
        self.rank: int = 0 if exchange is None else exchange.rank

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    def check_same(self, what: str, value: Any) -> None:
        """Make sure that all ranks have the same value.

        Args:
            what: names the value in the message.
            value: of JSON's types.

        Raises:
            ValueError: on every rank, if two ranks differ in it or in `what`, with each rank's value.
        """
        if self.size == 1:
            return
        texts = self._gather(what, json.dumps(value))
        if all(text == texts[0] for text in texts):
            return
        raise disagree([(what, json.loads(text)) for text in texts])

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean over ranks of each of `values`, the same to the bit on every rank."""
        if self.size == 1:
            return list(values)
        texts = self._gather(f"the mean of {len(values)} numbers", json.dumps(list(map(float, values))))
        return torch.tensor([json.loads(text) for text in texts], dtype=torch.float64).mean(dim=0).tolist()

    def all(self, flag: bool) -> bool:
        """Whether the flag is set on all ranks."""
        return all(json.loads(text) for text in self._gather("whether all can continue", json.dumps(bool(flag))))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on one rank at least."""
        return not self.all(not flag)

    def wait(self) -> None:
        """Come back when every rank has got here."""
        self._gather("a wait for all", "", settle=True)

    def _gather(self, what: str, text: str, settle: bool = False) -> list[str]:
        """Every rank's text; all ranks have to be at the same `what`."""
        if self._exchange is None:
            return [text]
        entries = self._exchange.gather(what, text, settle)
        if any(name != what for name, _ in entries):
            raise disagree(entries)
        return [message for _, message in entries]


def current_ranks() -> Ranks:
    """The processes of this training: torch.distributed's default group, or this one alone."""
    return Ranks(current_exchange())


def current_exchange() -> Exchange | None:
    """The messages between the processes of torch.distributed's default group, or None for a process alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    default = dist.group.WORLD
    if default not in _exchanges:
        _exchanges.clear()
        _exchanges[default] = Exchange(_get_default_store(), dist.get_rank(), dist.get_world_size())
    return _exchanges[default]


def disagree(values: Sequence[tuple[str, Any]]) -> ValueError:
    """The error of ranks that differ, as `disagreement` words it."""
    return ValueError(
        f"The processes disagree on {disagreement(values)}. Start every process with the same command, seed, model "
        "and options, and let each take the same steps."
    )


def disagreement(values: Sequence[tuple[str, Any]]) -> str:
    """In words: what ranks disagree on, and the value of each.

    Args:
        values: `(what, value)` of each rank. Of mappings with the same keys only the differing ones are shown.
    """
    names = list(dict.fromkeys(what for what, _ in values))
    if len(names) > 1:
        doing = "; ".join(f"rank {rank}: {what}" for rank, (what, _) in enumerate(values))
        return f"what to do next ({doing})"
    shown = [value for _, value in values]
    if all(isinstance(value, dict) for value in shown):
        keys = dict.fromkeys(key for value in shown for key in value)
        differing = [key for key in keys if any(value.get(key) != shown[0].get(key) for value in shown)]
        shown = [", ".join(f"{key}={value.get(key)!r}" for key in differing) for value in shown]
    texts = [shorten(value if isinstance(value, str) else json.dumps(value)) for value in shown]
    return f"{names[0]} ({'; '.join(f'rank {rank}: {text}' for rank, text in enumerate(texts))})"


def shorten(text: str) -> str:
    """A text of at most `MAX_SHOWN` characters."""
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
