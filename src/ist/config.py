"""The hyperparameters of Importance-aware Sparse Tuning, a field for each symbol of the paper."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = ["ISTConfig", "LayerCounts", "resolve_config"]

Policy = Literal["uniform", "proportional"]
CandidateSet = Literal["unsuppressed", "suppressed"]
ScoreStep = Literal["additive", "sigmoid_gradient"]
Rounding = Literal["half_up", "truncate"]
Damping = Literal["response", "scaling"]
Recomputation = Literal["none", "frozen", "all"]
FrozenMoments = Literal["keep", "reset", "offload"]
Preset = Literal["paper", "reference"]

# Where the authors' code departs from their paper, each departure is an option; a preset names a set of options.
Trains = Literal["adapters", "whole layers", "either"]
"""What a way of choosing layers trains in them; `either` is adapters where the model has some, and else all weights."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "policy": "uniform",
        "candidate_set": "unsuppressed",
        "score_step": "additive",
        "rounding": "half_up",
        "damping": "response",
        "probe_batch_size": None,
    },
    "reference": {
        "policy": "proportional",
        "candidate_set": "suppressed",
        "score_step": "sigmoid_gradient",
        "rounding": "truncate",
        "damping": "scaling",
        "probe_batch_size": 16,
    },
}


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


@dataclass(frozen=True, kw_only=True)
class ISTConfig:
    """Hyperparameters of Importance-aware Sparse Tuning (Yao et al., 2024), with the paper's defaults.

    A whole number is a count of layers and a float is a fraction of them: `8` means eight layers, `0.25` a quarter.
    Options that are `None` take the value that `preset` gives them, once: `dataclasses.replace` keeps them as they are.

    Raises:
        ValueError: a value is outside what is allowed; the message says what is and how to fix it.
    """

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
    """`μ`, the step size of the importance scores, at least 0 (eq. 10). The paper uses 100 for short trainings."""

    seed: int = 0
    """Seed of the choices and of the probe batches. The global random state is never read or changed."""

    preset: Preset = "paper"
    """`paper` follows the equations; `reference` does what the authors' code does."""

    policy: Policy | None = None
    """How sets are drawn: `uniform` takes the largest `p_i ~ U(0, sigmoid(I_i))` (eq. 6 and 7); `proportional` draws
    without replacement with probability proportional to `sigmoid(I_i)`."""

    candidate_set: CandidateSet | None = None
    """What a drawn candidate set is: the layers that stay `unsuppressed` and are rewarded (eq. 8 to 10), or the
    `suppressed` ones, which are drawn with the sign of the scores turned and pay the reward."""

    score_step: ScoreStep | None = None
    """`additive` adds `μ·r` (eq. 10); `sigmoid_gradient` adds `μ·r·p·(1 − p)` with `p = sigmoid(I)`."""

    rounding: Rounding | None = None
    """How a fraction of the layers becomes a count, never below 1: `half_up` or `truncate`."""

    damping: Damping | None = None
    """What `β` multiplies in a suppressed layer: the adapters' `response`, exactly (eq. 8), or the factor `scaling` of
    its modules, whatever their response makes of it. Both are the same for LoRA; DoRA's response does not
    follow its factor."""

    probe_batch_size: int | None = None
    """Examples in a probe batch. `None` is the training batch's size under `paper`, and 16 under `reference`.
    Batches that come ready-made keep their size, and a warning says so."""

    fused: bool = True
    """Whether LoRA modules are fused, which keeps nothing of frozen layers; those that cannot (DoRA,
    another tuner, …) compute as PEFT has them. Outputs and gradients are PEFT's within rounding."""

    frozen_dropout: bool = False
    """Whether the adapters of frozen layers drop their inputs out. Dropout regularises the adapters that learn from it;
    one that does not learn only makes noise and costs time. PEFT's have it also while frozen: `True` is for
    comparisons."""

    recompute: Recomputation = "none"
    """Which layers keep no activations and compute once more in the backward: `none`, the `frozen` ones, or
    `all`, as gradient checkpointing does. Layers below the lowest active one are never computed twice."""

    optimizer_state: FrozenMoments = "keep"
    """What happens to the optimizer's moments of frozen layers: `keep` leaves them, `reset` forgets them each time that
    the layer is frozen, `offload` has them wait in pinned host memory (on CUDA; the training is that of `keep`)."""

    price: float = 0.0
    """How much the cost of a step counts in the choice, in [0, 8]; 0, the paper's, is not at all. A set is drawn with
    its probability under the policy times `cost^-price`, see `ist.method.sampling.sample_affordable`."""

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, PRESETS)
        for name, default in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name, literal in _CHOICES.items():
            check_choice(name, getattr(self, name), get_args(literal))
        for name in ("fused", "frozen_dropout"):
            check_choice(name, getattr(self, name), (True, False))
        check_layer_number("num_active_layers", self.num_active_layers)
        check_layer_number("num_unsuppressed_layers", self.num_unsuppressed_layers)
        check_whole(
            "num_candidates", self.num_candidates, at_least=2, why="rewards compare candidate sets; the paper uses 3"
        )
        check_whole(
            "update_interval", self.update_interval, at_least=1, why="it counts optimizer steps; the paper uses 10"
        )
        check_whole("seed", self.seed, at_least=0, why="it seeds a random generator; give 0 or more")
        if self.probe_batch_size is not None:
            check_whole(
                "probe_batch_size",
                self.probe_batch_size,
                at_least=1,
                why="it counts examples; leave it out for the preset's size",
            )
        if not (is_number(self.beta) and 0 <= self.beta <= 1):
            raise ValueError(
                f"beta={self.beta!r} is not a number in [0, 1]: it scales a response; the paper uses 0.25."
            )
        if not (is_number(self.mu) and 0 <= self.mu < math.inf):
            raise ValueError(
                f"mu={self.mu!r} is not a finite number of at least 0: it is a step size; the paper uses 10, "
                "or 100 for short trainings."
            )

        if not (is_number(self.price) and 0 <= self.price <= 8):
            raise ValueError(
                f"price={self.price!r} is not a number in [0, 8]: it is the exponent of a step's cost; 0 leaves the "
                "cost out of the choice, 1 chooses by importance per cost."
            )

    def layer_counts(self, num_layers: int) -> LayerCounts:
        """`N_u` and `N_v` as whole numbers for a model of `num_layers` layers.

        Raises:
            ValueError: the model has fewer than 2 layers, or a count is larger than the model.
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

    @classmethod
    def from_options(cls, **options: Any) -> ISTConfig:
        """Build a configuration, naming the allowed options where one is unknown.

        Raises:
            ValueError: an option is unknown or its value is not allowed.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(f"Unknown option {', '.join(unknown)}: the options of ISTConfig are {', '.join(known)}.")
        return cls(**options)


def resolve_config(config: ISTConfig | None, options: Mapping[str, Any]) -> ISTConfig:
    """The configuration given as an object or as keywords.

    Raises:
        ValueError: both are given, or an option is unknown or not allowed.
    """
    if config is not None and not isinstance(config, ISTConfig):
        raise ValueError(
            f"config={config!r} is a {type(config).__name__}, not an ISTConfig: give the options as keywords, as in "
            "num_active_layers=8."
        )
    if config is None:
        return ISTConfig.from_options(**options)
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
    "damping": Damping,
    "recompute": Recomputation,
    "optimizer_state": FrozenMoments,
}


def is_number(value: Any) -> bool:
    """Whether `value` is a real number other than a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_choice(name: str, value: Any, allowed: Any) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in tuple(allowed):
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(repr(choice) for choice in allowed)}.")


def check_whole(name: str, value: Any, *, at_least: int, why: str) -> None:
    """Raise ValueError unless `value` is a whole number of at least `at_least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name}={value!r} is not a whole number of at least {at_least}: {why}.")


def check_layer_number(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a count of at least 1 or a fraction in (0, 1]."""
    allowed = is_number(value) and (0 < value <= 1 if isinstance(value, float) else value >= 1)
    if not allowed:
        raise ValueError(
            f"{name}={value!r} is neither a count of layers (a whole number of at least 1) nor a fraction of them "
            "(a float above 0 and up to 1): write 8 for eight layers or 0.25 for a quarter."
        )
