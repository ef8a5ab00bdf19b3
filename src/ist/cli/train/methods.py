"""The words after `--method` and `--adapter`: what goes with what, and which flags have an effect."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ...method.registry import SELECTORS, what_trains

__all__ = [
    "ADAPTERS",
    "ADAPTER_FLAGS",
    "BOTTLENECKS",
    "FOCUSED",
    "METHODS",
    "PLACEMENTS",
    "check_checkpointing",
    "check_method",
    "selector_of",
    "settle_adapter",
    "unused_flags",
]

PLACEMENTS = ("houlsby", "pfeiffer", "he")
"""Bottleneck adapters by their usual places."""
BOTTLENECKS = ("series", "parallel", *PLACEMENTS)
ADAPTERS = ("lora", "dora", "adalora", *BOTTLENECKS, "none")
OTHER = "other"
"""What flags have no effect on: a type of PEFT's by its name, or a configuration from a file."""
EVERY_ADAPTER = (*ADAPTERS, OTHER)
OTHER_NAMES = {"all": "peft"}
"""Selectors that have another name here: what `peft` trains is the PEFT method as it is."""

SELECTOR_OF = {OTHER_NAMES.get(name, name): name for name in SELECTORS}
"""Methods that name a selector of the library, and that selector."""

FOCUSED: dict[str, str | None] = {"focused": None, "even": "even", "top-gradient": "anywhere"}
"""Methods that put adapters on a set of layers that stays, and how each spreads it; None: as `--focus_spread` says."""

METHODS = (*SELECTOR_OF, "fixed", "greedy", *FOCUSED)
WITHOUT_CHOICE = ("peft", "full")
"""Methods that train every layer at every step."""


@dataclass(frozen=True)
class Flags:
    """Flags that have an effect under some methods or adapters alone."""

    names: frozenset[str]
    methods: frozenset[str] = frozenset(METHODS)
    adapters: frozenset[str] = frozenset(EVERY_ADAPTER)


def flags(names: str, methods: Collection[str] = METHODS, adapters: Collection[str] = EVERY_ADAPTER) -> Flags:
    """`Flags` of names with spaces between them."""
    return Flags(frozenset(names.split()), frozenset(methods), frozenset(adapters))


LIFT = [method for method in METHODS if method.startswith("lift-")]
CHOOSING = [method for method in METHODS if method not in (*WITHOUT_CHOICE, *FOCUSED)]
LORA_KIN = ("lora", "dora", "adalora")
EFFECTS = (
    flags(
        "num_unsuppressed_layers num_candidates beta mu candidate_set score_step suppression probe_batch_size", ["ist"]
    ),
    flags("policy cost_exponent", ["ist", "random", "lisa"]),
    flags("update_interval", ["ist", "lisa", *LIFT]),
    flags("num_active_layers preset rounding", CHOOSING),
    flags("frozen_dropout optimizer_state", CHOOSING),
    flags("recompute layers", [*CHOOSING, *FOCUSED]),
    flags("fused", [*CHOOSING, *FOCUSED], ["lora", OTHER]),
    flags("num_focused_layers focused_rank focus_min_depth", FOCUSED),
    flags("focus_init", FOCUSED, ["lora", "dora", OTHER]),
    flags("focus_criterion", ["focused", "top-gradient"]),
    flags("focus_spread", ["focused"]),
    flags("fixed_layers", ["fixed"]),
    flags("greedy_steps greedy_min_gain", ["greedy"]),
    flags("lora_r lora_alpha lora_dropout lora_target_modules", adapters=LORA_KIN),
    flags("lora_target_parameters use_rslora", adapters=["lora", "dora"]),
    flags("use_dora", adapters=["lora", "dora"]),
    flags("lora_modules_to_save lora_task_type", adapters=[a for a in ADAPTERS if a != "none"]),
    flags(
        "bottleneck_size bottleneck_non_linearity bottleneck_dropout bottleneck_sparsity",
        adapters=BOTTLENECKS,
    ),
    flags("bottleneck_target_modules", adapters=["series", "parallel"]),
    flags("adalora_init_r adalora_warmup_steps adalora_final_steps adalora_interval", adapters=["adalora"]),
)

ADAPTER_FLAGS = frozenset({"adapter"}).union(
    *(
        effect.names
        for effect in EFFECTS
        if len(effect.adapters) < len(EVERY_ADAPTER) and len(effect.methods) == len(METHODS)
    )
)
"""Flags that describe a new adapter."""


def unused_flags(method: str, adapter: str, given: Collection[str]) -> list[str]:
    """The flags among those given that have no effect with a method and an adapter, as they are written."""
    adapter = adapter if adapter in ADAPTERS else OTHER
    without = {
        name
        for effect in EFFECTS
        for name in effect.names
        if method not in effect.methods or adapter not in effect.adapters
    }
    return [f"--{name}" for name in given if name in without]


def settle_adapter(method: str, adapter: str | None, chosen_here: bool) -> str:
    """The adapter that goes with a method: LoRA if none is named, and none where the model itself trains.

    Args:
        method: which layers train.
        adapter: as named, or None.
        chosen_here: whether it was named on the command line; what a recipe names gives way to the method.

    Raises:
        ValueError: the two do not go together.
    """
    whole = method in SELECTOR_OF and what_trains(SELECTORS[SELECTOR_OF[method]]) == "whole layers"
    if whole and chosen_here and adapter != "none":
        raise ValueError(
            f"--method {method} trains the model's own weights, so --adapter {adapter} does not go with it: leave it "
            "out, or give none."
        )
    if whole:
        return "none"
    if adapter == "none" and method in ("ist", "random", "peft", *FOCUSED):
        instead = "--method full" if method == "peft" else "--method lisa"
        raise ValueError(
            f"--method {method} trains adapters, so it does not go with --adapter none: name one, or take {instead}, "
            "which trains the model's own weights."
        )
    return adapter or "lora"


def check_checkpointing(method: str, recompute: str, training: Any) -> None:
    """Raise ValueError where gradient checkpointing is on beside `--recompute`, which does the same.

    Args:
        method: which layers train.
        recompute: the value of `--recompute`.
        training: TRL's `SFTConfig`.
    """
    if recompute != "none" and method not in WITHOUT_CHOICE and training.gradient_checkpointing:
        raise ValueError(
            f"--recompute {recompute} and --gradient_checkpointing are both on: leave one of them out; --recompute "
            "frozen is the faster one, --gradient_checkpointing the smaller one."
        )


CAUSAL_LM = "CAUSAL_LM"
"""PEFT's word for the models that are trained here."""


def check_method(ist: Any, model: Any, training: Any) -> None:
    """Raise ValueError at flags that contradict each other.

    Args:
        ist: this library's arguments, the adapter settled.
        model: TRL's `ModelConfig`.
        training: TRL's `SFTConfig`.
    """
    if ist.method == "fixed" and not ist.fixed_layers:
        raise ValueError(
            "--method fixed needs --fixed_layers: indices (0,3,5), names of blocks, random, top:FILE or bottom:FILE."
        )
    if model.lora_task_type != CAUSAL_LM:
        raise ValueError(
            f"lora_task_type={model.lora_task_type!r} is not what is trained: `ist train` trains causal language "
            "models, and PEFT would load the adapter as another kind; leave it out."
        )
    if ist.adapter == "adalora" and training.max_steps <= 0:
        raise ValueError(
            "--adapter adalora needs --max_steps: AdaLoRA's schedule of ranks ends with the training, whose length has "
            "to be known when the adapter is made."
        )
    if ist.adapter == "adalora" and ist.method == "greedy":
        raise ValueError("--method greedy does not go with AdaLoRA, whose ranks its trials would allocate: take lora.")
    if ist.adapter == "none" and (model.load_in_4bit or model.load_in_8bit):
        raise ValueError(
            f"--method {ist.method} without an adapter trains the model's own weights, and quantised ones cannot be: "
            "leave load_in_4bit and load_in_8bit out."
        )


def selector_of(ist: Any) -> str | None:
    """The selector that `IST` gets for a method, or None where the Trainer trains alone.

    AdaLoRA always gets `IST`, since the Trainer does not allocate its ranks. The greedy search gives its set later.
    """
    if ist.method == "greedy":
        return None
    if ist.method == "fixed":
        return f"fixed:{ist.fixed_layers}"
    if ist.method in FOCUSED:
        return "all"
    if ist.method in WITHOUT_CHOICE and ist.adapter != "adalora":
        return None
    return SELECTOR_OF[ist.method]
