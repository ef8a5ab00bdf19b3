"""What is timed: each case is a way to train one model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import FIVE, SEVEN
from ist.step.fused import choice, few

__all__ = ["GROUPS", "Case"]


@dataclass(frozen=True)
class Case:
    """What is run: `options` None is PEFT alone, otherwise they are IST's."""

    name: str
    options: dict[str, Any] | None = None
    modules: tuple[str, ...] = FIVE
    dropout: float = 0.05
    liger: bool = False
    compiled: bool = False
    precision: str = "float32"
    """Of the adapters: `float32`, which PEFT makes them; `autocast`, the same under autocast, as the Trainer trains
    them with bf16=True; `bfloat16`, as PEFT makes them with autocast_adapter_dtype=False."""
    floor: bool = False
    """The base model alone: forward, and backward to the embeddings."""
    whole_probes: bool = False
    """Whether probe batches are as large as training batches."""
    probe_tokens: int | None = None
    """Tokens of a row of a probe batch where these are fewer, as of a `probe_dataset` of shorter rows."""
    kept: float = 1.0
    """The part of the layers that have adapters, evenly spread, with the rank of all moved to them."""
    above: float = 0.0
    """The lowest part of the depth that has none, where the backward ends."""

    most_rows: int | None = None
    """Up to how many rows the function of few rows serves; None is as the library has it."""
    kernels: bool = True
    """Whether kernels of the library's own serve where there are any."""

    @contextmanager
    def constants(self) -> Iterator[None]:
        """Within the context the library has what the case says."""
        rows = few.MOST_ROWS if self.most_rows is None else self.most_rows
        in_kernels = choice.in_kernels if self.kernels else lambda *_: None
        with patch.object(few, "MOST_ROWS", rows), patch.object(choice, "in_kernels", in_kernels):
            yield

    @property
    def measures(self) -> bool:
        """Whether there is an importance loop."""
        return self.options is not None and self.options.get("selector") != "all"

    @property
    def adapter(self) -> tuple[Any, ...] | None:
        """What has to be on the model: equal for cases that share adapters; None is nothing."""
        if self.floor:
            return None
        return self.modules, self.dropout, self.precision == "bfloat16", self.kept, self.above


ALL = {"selector": "all"}
"""Our step on every adapter that there is, with nothing frozen or measured."""
RECOMPUTED = {**ALL, "recompute": "frozen"}
"""The same, with the blocks that have no adapters recomputed."""
NORMS = {**ALL, "recompute": "norms"}
"""The same, with the outputs of norms made again."""
FAST: dict[str, Any] = {"dropout": 0.0, "liger": True}
PARTS = {"half": 1 / 2, "third": 1 / 3, "quarter": 1 / 4}
UPPER = {
    "half above an eighth": (1 / 2, 1 / 8),
    "half above a quarter": (1 / 2, 1 / 4),
    "third above a quarter": (1 / 3, 1 / 4),
    "all above a quarter": (3 / 4, 1 / 4),
}
"""Parts of the layers, all of them above the lowest part of the depth."""


def focused(options: dict[str, Any] | None, name: str, **more: Any) -> tuple[Case, ...]:
    """A half, a third and a quarter of the layers; `name` has a place for the part's."""
    return tuple(Case(name.format(part), options, kept=kept, **more) for part, kept in PARTS.items())


def upper(options: dict[str, Any] | None, name: str, **more: Any) -> tuple[Case, ...]:
    """The parts of `UPPER`; `name` has a place for the part's."""
    return tuple(
        Case(name.format(part), options, kept=kept, above=above, **more) for part, (kept, above) in UPPER.items()
    )


SHORT: dict[str, Any] = {"dropout": 0.0, "precision": "bfloat16"}
"""What focused training is measured with where launching counts, at one row."""


def short(suffix: str = "", **more: Any) -> tuple[Case, ...]:
    """LoRA and parts of the layers, in PEFT's step and in ours."""
    settings = {**SHORT, **more}
    return (
        Case(f"LoRA, bfloat16 adapters, no dropout{suffix}", **settings),
        Case(f"LoRA in our step, bfloat16 adapters, no dropout{suffix}", ALL, **settings),
        *focused(ALL, "focused {}, bfloat16 adapters, no dropout" + suffix, **settings),
        *focused(None, "focused {} in PEFT's step, bfloat16 adapters, no dropout" + suffix, **settings),
    )


def few_rows(part: str, kept: float, precision: str = "bfloat16") -> tuple[Case, ...]:
    """The ways to compute active modules without dropout, of which the library takes one by the number of rows."""
    name = part if precision == "bfloat16" else f"{part}, {precision} adapters"
    settings: dict[str, Any] = {**SHORT, "kept": kept, "precision": precision}
    few = (Case(f"{name}, function of few rows", ALL, most_rows=2**31, **settings),)
    return (
        Case(f"{name}, PEFT's step", **settings),
        *(few if precision == "bfloat16" else ()),
        Case(f"{name}, function", ALL, most_rows=0, **settings),
        Case(f"{name}, function without kernels", ALL, most_rows=0, kernels=False, **settings),
    )


GROUPS: dict[str, tuple[Case, ...]] = {
    "lora": (Case("LoRA"),),
    "plain": (
        Case("floor", floor=True),
        Case("LoRA"),
        Case("IST, PEFT's forward", {"fused": False}),
        Case("IST", {}),
        Case("IST, frozen layers recomputed", {"recompute": "frozen"}),
    ),
    "probes": (Case("IST, probes as large as the training batch", {}, whole_probes=True),),
    "short-probes": (Case("IST, probes of 256 tokens", {}, probe_tokens=256),),
    "autocast": (
        Case("LoRA, autocast", precision="autocast"),
        Case("IST, autocast", {}, precision="autocast"),
    ),
    "bfloat16": (
        Case("LoRA, bfloat16 adapters", precision="bfloat16"),
        Case("IST, bfloat16 adapters", {}, precision="bfloat16"),
    ),
    "seven": (Case("LoRA, seven modules, no dropout", modules=SEVEN, dropout=0.0),),
    "compiled": (
        Case("IST, compiled by layer", {}, compiled=True),
        Case("IST, compiled by layer, probes of 256 tokens", {}, compiled=True, probe_tokens=256),
        Case("floor, compiled by layer", floor=True, compiled=True),
        Case("LoRA, compiled by layer", compiled=True),
    ),
    "focused-short": (
        Case("floor, no dropout", floor=True, dropout=0.0),
        *short(),
        Case("focused quarter, bfloat16 adapters, no dropout, recomputed", RECOMPUTED, kept=1 / 4, **SHORT),
    ),
    "few-rows": (*few_rows("quarter", 1 / 4), *few_rows("half", 1 / 2)),
    "few-rows-all": few_rows("all", 1.0),
    "few-rows-float32": (*few_rows("quarter", 1 / 4, "float32"), *few_rows("quarter", 1 / 4, "autocast")),
    "compiled-focused-short": (
        Case("floor, no dropout, compiled by layer", floor=True, dropout=0.0, compiled=True),
        *short(", compiled by layer", compiled=True),
    ),
    "compiled-bfloat16": (Case("IST, bfloat16 adapters, compiled by layer", {}, compiled=True, precision="bfloat16"),),
    "liger": (
        Case("floor, Liger", floor=True, liger=True),
        Case("LoRA, Liger", liger=True),
        Case("IST, Liger", {}, liger=True),
        Case("IST, Liger, frozen layers recomputed", {"recompute": "frozen"}, liger=True),
    ),
    "focused": (
        Case("floor, Liger, no dropout", floor=True, **FAST),
        Case("LoRA, Liger, no dropout", **FAST),
        Case("LoRA in our step, Liger, no dropout", ALL, **FAST),
        *focused(ALL, "focused {}, Liger, no dropout", **FAST),
        *focused(RECOMPUTED, "focused {}, Liger, no dropout, recomputed", **FAST),
    ),
    "focused-norms": (
        Case("LoRA in our step, Liger, no dropout, norms recomputed", NORMS, **FAST),
        *focused(NORMS, "focused {}, Liger, no dropout, norms recomputed", **FAST),
    ),
    "focused-upper": upper(ALL, "focused {}, Liger, no dropout", **FAST),
    "focused-peft": focused(None, "focused {} in PEFT's step, Liger, no dropout", **FAST),
    "focused-autocast": focused(ALL, "focused {}, Liger, no dropout, autocast", precision="autocast", **FAST),
    "seven-liger": (Case("IST, Liger, seven modules, no dropout", {}, modules=SEVEN, dropout=0.0, liger=True),),
}
"""In the order in which they run: what changes the model for good comes last."""
