"""Small messages between the processes of a training, by way of the store that torch.distributed keeps.

A collective of gloo or NCCL that one rank misses cannot be given up: it holds its process until the group's time limit,
and one that meets another of a different size ends the process. Keys of a store can be waited for with a time limit
of one's own, looked at, and left alone; a round takes no longer than a collective of gloo.

In round `n` each rank writes its message to the key `n/rank`. Rank 0 reads them all and writes them to `n/all`, once
where they are equal. The others read that and remove their own key, by which rank 0 knows that they have.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch import distributed as dist
from torch.distributed.constants import default_pg_timeout

__all__ = ["Exchange"]

DEFAULT_LIMIT = timedelta(minutes=10)
"""How long a rank may be missing where the process group was given no time limit of its own."""

PATIENCE = 10.0
"""Seconds until a rank that waits begins to look for the reason."""

INTERVAL = 0.1
"""Seconds between two looks."""

FAILED = "!"
"""How `n/all` begins where the round was given up; the reason follows."""

ADVICE = (
    "Let every process begin and end the same steps, also one that has less data or that caught an error; for slow "
    "ones, give init_process_group a longer timeout (ddp_timeout of the Trainer)."
)


class Exchange:
    """Rounds of messages, in which every rank takes part in the same order.

    A round that is given up ends with the same error on each rank, also on those that come late; and so does every
    later round, since nobody knows any more what the others do.

    Args:
        store: of the default process group, which outlives that group here.
        rank: of this process.
        size: number of processes.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        # A process group may be made anew over the same store, with the keys of the former one in it.
        epoch = store.add(f"ist/epoch/{rank}", 1)
        self._store = dist.PrefixStore(f"ist/{epoch}", store)
        given = store.timeout
        self._limit = (DEFAULT_LIMIT if given == default_pg_timeout else given).total_seconds()
        self._round = 0
        self._failure: str | None = None
        atexit.register(self._leave)

    def gather(self, what: str, text: str, settle: bool = False) -> list[tuple[str, str]]:
        """Send a message to all ranks.

        Args:
            what: names the message in errors.
            text: the message.
            settle: have rank 0 come back when the others have read it, and not before.

        Returns:
            `what` and `text` of each rank, by rank.

        Raises:
            ValueError: on every rank, where one does not come within the time limit or has ended.
        """
        if self._failure:
            raise ValueError(self._failure)
        self._round += 1
        own = f"{self._round}/{self.rank}"
        try:
            self._store.set(own, json.dumps([what, text]))
            value = self._collect(what) if self.rank == 0 else self._read(what)
            if not value.startswith(FAILED) and self.rank != 0:
                self._store.delete_key(own)
        except RuntimeError as error:  # The store went away with the process that keeps it.
            value = FAILED + (
                f"The store of the processes cannot be reached at {what!r} on rank {self.rank}; rank 0, which keeps "
                f"it, may have ended ({shorten(error)}). {ADVICE}"
            )
        if value.startswith(FAILED):
            self._failure = value.removeprefix(FAILED)
            raise ValueError(self._failure)
        if settle and self.rank == 0:
            self._settle(self._limit)
        entries = [(name, message) for name, message in json.loads(value)]
        return entries * self.size if len(entries) == 1 else entries

    def _collect(self, what: str) -> str:
        """Rank 0: read the messages of all and pass them on."""
        keys = [f"{self._round}/{rank}" for rank in range(self.size)]
        if failure := self._wait(keys, what):
            return failure
        messages = [value.decode() for value in self._store.multi_get(keys)]
        same = all(message == messages[0] for message in messages)
        value = f"[{messages[0]}]" if same else f"[{', '.join(messages)}]"
        value = self._store.compare_set(f"{self._round}/all", "", value).decode()
        if not value.startswith(FAILED):
            self._store.delete_key(keys[0])
            self._store.delete_key(f"{self._round - 1}/all")
        return value

    def _read(self, what: str) -> str:
        """Another rank: read what rank 0 passes on."""
        key = f"{self._round}/all"
        return self._wait([key], what) or self._store.get(key).decode()

    def _wait(self, keys: Sequence[str], what: str) -> str | None:
        """Wait for keys; returns why there is no sense in it, as `n/all` then holds it, or None when they are there."""
        start = time.monotonic()
        with contextlib.suppress(RuntimeError):  # The store's own word for "not yet".
            self._store.wait(list(keys), timedelta(seconds=min(PATIENCE, self._limit)))
            return None
        while not self._store.check(list(keys)):
            if self._store.check([f"{self._round}/all"]):  # given up by another rank
                return self._store.get(f"{self._round}/all").decode()
            waited = time.monotonic() - start
            missing = [rank for rank in range(self.size) if not self._store.check([f"{self._round}/{rank}"])]
            if why := self._find_reason(missing, waited):
                here = ranks_are([rank for rank in range(self.size) if rank not in missing], "wait")
                text = f"{FAILED}{why[0].upper()}{why[1:]}, while {here} at {what!r}. {ADVICE}"
                return self._store.compare_set(f"{self._round}/all", "", text).decode()
            time.sleep(INTERVAL)
        return None

    def _find_reason(self, missing: Sequence[int], waited: float) -> str | None:
        """Why the missing ranks will not come, or None while they may."""
        if gone := [rank for rank in missing if self._store.check([f"gone/{rank}"])]:
            return ranks_are(gone, "ended")
        if missing and waited >= self._limit:
            return f"{ranks_are(missing, 'did')} not come within {self._limit:.0f} s"
        return None

    def _settle(self, seconds: float) -> None:
        """Rank 0: wait until the others have read what it passed on."""
        end = time.monotonic() + seconds
        pending = [f"{self._round}/{rank}" for rank in range(1, self.size)]
        while pending and time.monotonic() < end:
            pending = [key for key in pending if self._store.check([key])]
            time.sleep(1e-4 if pending else 0)

    def _leave(self) -> None:
        """This process ends: say so, and keep the store until the others have read the last round."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"gone/{self.rank}", "1")
            if self.rank == 0 and not self._failure:
                self._settle(PATIENCE)


def ranks_are(ranks: Sequence[int], verb: str) -> str:
    """`rank 1 waits`, `ranks 0, 2 wait`: a verb in the present, or one that has one form."""
    named = f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
    return f"{named} {verb}{'s' if len(ranks) == 1 and verb == 'wait' else ''}"


def shorten(error: Exception) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
