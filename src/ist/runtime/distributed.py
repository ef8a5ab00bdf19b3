"""Several processes that train one model choose the same layers and learn the same importance.

The choice needs no message: it depends on seed, step and scores alone (`ist.method.sampling`). Two small things are
sent: the losses of candidate sets, averaged so that every rank learns from the whole batch, and digests of what all
ranks must have in common. Ranks that disagree end with an error on each of them; without the digests they would wait
for each other's gradients forever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["Ranks", "current_ranks"]

MAX_SHOWN = 200
"""Characters of a rank's value in an error message."""

_cpu_groups: dict[Any, Any] = {}
"""For default groups that cannot exchange CPU tensors: groups of the same processes that can."""


class Ranks:
    """The processes that train together; alone where torch.distributed is not in use.

    Every method but the properties is a collective: all ranks have to call it, in the same order.

    Args:
        group: processes that exchange CPU tensors, or None for a process alone.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.size: int = 1 if group is None else dist.get_world_size(group)
        self.rank: int = 0 if group is None else dist.get_rank(group)

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
        text = json.dumps(value)
        digests = self._gather(torch.tensor([digest(what), digest(text)]))
        if all(torch.equal(other, digests[0]) for other in digests):
            return
        values: list[Any] = [None] * self.size
        for rank, encoded in enumerate(self._gather_bytes(json.dumps([what, value]).encode())):
            values[rank] = json.loads(encoded)
        raise ValueError(
            f"The processes disagree on {disagreement(values)}. Start every process with the same command, seed, model "
            "and options, and let each take the same steps."
        )

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean over ranks of each of `values`, the same to the bit on every rank."""
        if self.size == 1:
            return list(values)
        return torch.stack(self._gather(torch.tensor(values, dtype=torch.float64))).mean(dim=0).tolist()

    def all(self, flag: bool) -> bool:
        """Whether the flag is set on all ranks."""
        return all(bool(other) for other in self._gather(torch.tensor(flag, dtype=torch.uint8)))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on one rank at least."""
        return not self.all(not flag)

    def wait(self) -> None:
        """Come back when every rank has got here."""
        self.all(True)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor; all of one shape."""
        if self.size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor, group=self._group)
        return gathered

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, which may be of different lengths."""
        lengths = [int(length) for length in self._gather(torch.tensor(len(data)))]
        padded = torch.frombuffer(bytearray(data.ljust(max(lengths), b" ")), dtype=torch.uint8)
        gathered = self._gather(padded)
        return [bytes(other[:length].tolist()) for other, length in zip(gathered, lengths, strict=True)]


def current_ranks() -> Ranks:
    """The processes of this training: torch.distributed's default group, or this one alone.

    A collective at its first call, where the default group's backend (NCCL) takes no CPU tensors: a group of the same
    processes is made then that talks over gloo, so that no exchange has to wait for the GPU.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Ranks()
    default = dist.group.WORLD
    if "gloo" in str(dist.get_backend_config(default)):
        return Ranks(default)
    if default not in _cpu_groups:
        _cpu_groups.clear()
        _cpu_groups[default] = dist.new_group(backend="gloo")
    return Ranks(_cpu_groups[default])


def digest(text: str) -> int:
    """63 bits that two different texts share by no accident."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


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
