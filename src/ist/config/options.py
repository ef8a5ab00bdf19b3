"""Two dataclasses, the paper's options and how a step is executed, and `ISTConfig`, which has the fields of both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, TypeVar, cast, get_args

from .checks import check_choice, check_layer_number, check_whole, is_number
from .keywords import keywords_of, unknown_keywords
from .presets import PRESETS, current_names, settle_options

__all__ = ["ISTConfig", "LayerCounts", "PaperOptions", "StepOptions", "Suppression", "Trains", "resolve_config"]

Policy = Literal["uniform", "proportional"]
CandidateSet = Literal["unsuppressed", "suppressed"]
ScoreStep = Literal["additive", "sigmoid_gradient"]
Rounding = Literal["half_up", "truncate"]
Suppression = Literal["response", "scaling"]
Recomputation = Literal["none", "norms", "frozen", "all"]
FrozenMoments = Literal["keep", "reset", "offload"]
Preset = Literal["paper", "authors"]

Trains = Literal["adapters", "whole layers", "either"]
"""What a way of choosing layers trains in them; `either` is adapters where the model has some, and else all weights."""

Options = TypeVar("Options")


def settled(options_class: type[Options]) -> type[Options]:
    """A dataclass whose constructor takes options under their old names, and those not given from the preset."""
    declared: Callable[..., None] = options_class.__init__

    @wraps(declared)
    def constructor(self: Options, **options: Any) -> None:
        known = [field.name for field in dataclasses.fields(cast("Any", options_class))]
        if message := unknown_keywords(options_class.__name__, current_names(options), known):
            raise TypeError(message)
        declared(self, **settle_options(options))

    options_class.__init__ = constructor  # type: ignore[method-assign]
    return options_class


@dataclass(frozen=True)
class LayerCounts:
    """The layer counts of one model: whole numbers where the configuration may hold fractions."""

    total: int
    """`N_L`: layers that carry adapters."""
    active: int
    """`N_u`: layers whose adapters an optimizer step updates."""
    unsuppressed: int
    """`N_v`: layers of a candidate set that keep their full response."""

    @property
    def distinct_candidates(self) -> int:
        """How many different candidate sets exist: `N_L choose N_v`."""
        return math.comb(self.total, self.unsuppressed)


@settled
@dataclass(frozen=True, kw_only=True)
class PaperOptions:
    """A field for each symbol of the paper (Yao et al., 2024), and for each departure of its authors' code from it."""

    num_active_layers: int | float = 0.25
    """`N_u`, the layers that a step updates: a count of at least 1, or a fraction in (0, 1]."""

    num_unsuppressed_layers: int | float = 0.5
    """`N_v`, the layers of a candidate set that keep their response: a count of at least 1, or a fraction in (0, 1]."""

    num_candidates: int = 3
    """`N_c`, candidate sets for each importance update: at least 2 (fewer are drawn where fewer exist)."""

    update_interval: int = 10
    """`T_c`, optimizer steps between two importance updates (of LISA and LIFT: between two sets): at least 1."""

    beta: float = 0.25
    """`β`, the factor on the adapters' response in suppressed layers, in [0, 1] (eq. 8)."""

    mu: float = 10.0
    """`μ`, the step size of the importance scores (eq. 10), at least 0: 10 by default, the paper's for some 30,000
    steps; give 100 for short trainings, of some 2,000 steps or fewer."""

    seed: int = 0
    """Seed of the choices and of the probe batches. The global random state is never read or changed."""

    preset: Preset = "paper"
    """`paper` follows the equations; `authors` does what the authors' code does."""

    policy: Policy = "uniform"
    """How sets are drawn: `uniform` takes the largest `p_i ~ U(0, sigmoid(I_i))` (eq. 6 and 7); `proportional`, which
    is the authors', draws without replacement with probability proportional to `sigmoid(I_i)`."""

    candidate_set: CandidateSet = "unsuppressed"
    """What a drawn candidate set is: the layers that stay `unsuppressed` and are rewarded (eq. 8 to 10), or, the
    authors', the `suppressed` ones, which are drawn with the sign of the scores turned and pay the reward."""

    score_step: ScoreStep = "additive"
    """`additive` adds `μ·r` (eq. 10); `sigmoid_gradient`, the authors', adds `μ·r·p·(1 − p)` with `p = sigmoid(I)`."""

    rounding: Rounding = "half_up"
    """How a fraction of the layers becomes a count, never below 1: `half_up`, or `truncate` as the authors do."""

    suppression: Suppression = "response"
    """What `β` multiplies in a suppressed layer: the adapters' `response`, exactly (eq. 8), or, the authors', the
    factor `scaling` of its modules, whatever their response makes of it. Both are the same for LoRA; DoRA's response
    does not follow its factor."""

    probe_batch_size: int | None = None
    """Examples in a probe batch. `None` is the training batch's size under `paper`, and 16 under `authors`.
    Batches that come ready-made keep their size, and a warning says so."""

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, PRESETS)
        for name in ("policy", "candidate_set", "score_step", "rounding", "suppression"):
            check_choice(name, getattr(self, name), get_args(_CHOICES[name]))
        check_layer_number("num_active_layers", self.num_active_layers)
        check_layer_number("num_unsuppressed_layers", self.num_unsuppressed_layers)
        for name, (least, why) in _WHOLE.items():
            value = getattr(self, name)
            if value is not None or name != "probe_batch_size":
                check_whole(name, value, at_least=least, why=why)
        if not (is_number(self.beta) and 0 <= self.beta <= 1):
            raise ValueError(
                f"beta={self.beta!r} is not a number in [0, 1]: it scales a response; the paper uses 0.25."
            )
        if not (is_number(self.mu) and 0 <= self.mu < math.inf):
            raise ValueError(
                f"mu={self.mu!r} is not a finite number of at least 0: it is a step size; the paper uses 10, "
                "or 100 for short trainings."
            )

    def layer_counts(self, num_layers: int) -> LayerCounts:
        """`N_u` and `N_v` as whole numbers for a model of `num_layers` layers.

        Raises:
            ValueError: fewer than two layers to choose among, or a count above `num_layers`.
        """
        if num_layers < 2:
            raise ValueError(
                f"The model has {num_layers} layer(s) with adapters, and choosing among layers needs at least 2: "
                "put adapters on more layers (target_modules, layers_to_transform), or train without IST."
            )
        active = self._count("num_active_layers", self.num_active_layers, num_layers)
        if self.candidate_set == "suppressed" and isinstance(self.num_unsuppressed_layers, float):
            # The authors' code rounds the number of suppressed layers, not that of the others.
            share = 1 - self.num_unsuppressed_layers
            unsuppressed = max(1, num_layers - (self._round(share * num_layers) if share else 0))
        else:
            unsuppressed = self._count("num_unsuppressed_layers", self.num_unsuppressed_layers, num_layers)
        return LayerCounts(total=num_layers, active=active, unsuppressed=unsuppressed)

    def _count(self, name: str, value: int | float, num_layers: int) -> int:
        if isinstance(value, float):
            return min(num_layers, self._round(value * num_layers))
        if value > num_layers:
            raise ValueError(
                f"{name}={value} is more than the {num_layers} layers that carry adapters: "
                f"give a count from 1 to {num_layers}, or a fraction such as 0.25."
            )
        return value

    def _round(self, value: float) -> int:
        """Round to a count of at least 1; 0.7 of 45 layers are 31.5, which floats put a little below."""
        value = round(value, 9)
        return max(1, math.floor(value + 0.5) if self.rounding == "half_up" else math.floor(value))


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step is executed, and what its cost counts. Nothing here is in the paper; the defaults train as it does."""

    fused: bool = True
    """Whether LoRA modules are fused, which keeps nothing of frozen layers in memory; those that cannot (DoRA, another
    tuner, …) run as PEFT has them. Outputs and gradients are PEFT's within rounding."""

    frozen_dropout: bool = False
    """Whether the adapters of frozen layers drop their inputs out, as PEFT's do. Dropout regularises the adapters that
    learn from it; one that does not learn only makes noise and costs time."""

    recompute: Recomputation = "none"
    """What the backward computes again instead of keeping it: outputs of Liger's RMSNorm in active layers (`norms`),
    those and frozen layers (`frozen`), or `all` layers, as checkpointing does; nothing below the lowest active one."""

    optimizer_state: FrozenMoments = "keep"
    """What happens to the optimizer's moments of frozen layers: `keep` leaves them, `reset` forgets them each time that
    the layer is frozen, `offload` has them wait in pinned host memory (on CUDA; the training is that of `keep`)."""

    cost_exponent: float = 0.0
    """How much the cost of a step counts in the choice, in [0, 8]; 0, the paper's, is not at all. A set is drawn with
    its probability under the policy times `cost^-cost_exponent`, see `ist.method.sampling.sample_cost_aware`."""

    def __post_init__(self) -> None:
        for name in ("recompute", "optimizer_state"):
            check_choice(name, getattr(self, name), get_args(_CHOICES[name]))
        for name in ("fused", "frozen_dropout"):
            check_choice(name, getattr(self, name), (True, False))
        if self.recompute == "norms" and not self.fused:
            raise ValueError("recompute='norms' needs fused=True, since fused modules make norms again: change one.")
        if not (is_number(self.cost_exponent) and 0 <= self.cost_exponent <= 8):
            raise ValueError(
                f"cost_exponent={self.cost_exponent!r} is not a number in [0, 8]: 0 leaves the cost out of the choice, "
                "1 chooses by importance per cost."
            )


@settled
@dataclass(frozen=True, kw_only=True)
class ISTConfig(StepOptions, PaperOptions):
    """All options of Importance-aware Sparse Tuning (Yao et al., 2024), with the paper's defaults.

    A whole number is a count of layers and a float is a fraction of them: `8` means eight layers, `0.25` a quarter.
    Options that are not given, or None, have the value that `preset` gives them.

    ::

        ISTConfig.paper(num_active_layers=8)
        ISTConfig.authors(mu=100.0)             # the same as ISTConfig(preset="authors", mu=100.0)

    Raises:
        ValueError: a value is outside what is allowed; the message says what is and how to fix it.
    """

    def __post_init__(self) -> None:
        PaperOptions.__post_init__(self)
        StepOptions.__post_init__(self)

    @classmethod
    def paper(cls, **options: Any) -> ISTConfig:
        """The equations of the paper, with `options` on top."""
        return cls.from_options(**{**options, "preset": "paper"})

    @classmethod
    def authors(cls, **options: Any) -> ISTConfig:
        """What the authors' code does where it departs from the paper, with `options` on top."""
        return cls.from_options(**{**options, "preset": "authors"})

    @classmethod
    def from_options(cls, **options: Any) -> ISTConfig:
        """Build a configuration, naming the allowed options where one is unknown.

        Raises:
            ValueError: an option is unknown or its value is not allowed.
        """
        check_options("ISTConfig", options)
        return cls(**options)


def check_options(what: str, options: Mapping[str, Any], others: Sequence[str] = ()) -> None:
    """Raise ValueError unless the options given to `what` are fields of `ISTConfig`; `others` are its own keywords."""
    allowed = [*others, *(field.name for field in dataclasses.fields(ISTConfig))]
    if message := unknown_keywords(what, current_names(options), allowed):
        raise ValueError(message)


def resolve_config(config: ISTConfig | None, options: Mapping[str, Any], taker: Callable[..., Any]) -> ISTConfig:
    """The configuration given as an object or as keywords.

    Args:
        config: the object, or None.
        options: the keywords.
        taker: the function or class that was called with them, whose own keywords a message names too.

    Raises:
        ValueError: both are given, or an option is unknown or not allowed.
    """
    if config is not None and not isinstance(config, ISTConfig):
        given = type(config).__name__
        raise ValueError(f"config is a {given} and no ISTConfig: give options as keywords, num_active_layers=8 say.")
    check_options(taker.__name__, options, keywords_of(taker))
    if config is None:
        return ISTConfig(**options)
    if options:
        raise ValueError(
            f"Both a config and the options {', '.join(options)} were given: give all options in one of the two ways."
        )
    return config


_CHOICES: dict[str, Any] = {
    "policy": Policy,
    "candidate_set": CandidateSet,
    "score_step": ScoreStep,
    "rounding": Rounding,
    "suppression": Suppression,
    "recompute": Recomputation,
    "optimizer_state": FrozenMoments,
}
_WHOLE = {
    "num_candidates": (2, "rewards compare candidate sets; the paper uses 3"),
    "update_interval": (1, "it counts optimizer steps; the paper uses 10"),
    "seed": (0, "it seeds a random generator; give 0 or more"),
    "probe_batch_size": (1, "it counts examples; leave it out for the preset's size"),
}
"""Options that are whole numbers: the least that is allowed, and why."""
