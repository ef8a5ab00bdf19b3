"""ISTConfig: what it accepts, what it says otherwise, and how fractions become counts."""

import dataclasses
import json
import math
from fractions import Fraction
from typing import Any

import numpy
import pytest

from ist import IST
from ist.config import PRESETS, ISTConfig, LayerCounts, PaperOptions, StepOptions, resolve_config

NAN, INF = math.nan, math.inf
LAYER_NUMBER = ("a whole number of at least 1", "a float above 0 and up to 1", "write 8 for eight layers or 0.25")

# An option, a value that is not allowed, and what the message must say besides both: what is allowed, and the way out.
BAD_VALUES = [
    *(
        (name, value, *LAYER_NUMBER)
        for name in ("num_active_layers", "num_unsuppressed_layers")
        for value in (0, -1, True, False, 0.0, -0.25, 1.5, 8.0, NAN, INF, -INF, "8", None)
    ),
    *(("beta", value, "in [0, 1]", "0.25") for value in (-0.01, 1.01, 2, INF, NAN, True, "0.25", None)),
    *(
        ("mu", value, "a finite number of at least 0", "the paper uses 10, or 100 for short trainings")
        for value in (-1, -1e-9, INF, -INF, NAN, True, "10", None)
    ),
    *(("update_interval", value, "at least 1", "optimizer steps") for value in (0, -10, 10.0, NAN, True, "10", None)),
    *(("num_candidates", value, "at least 2", "compare candidate sets") for value in (1, 0, -3, 3.0, NAN, True, None)),
    *(("seed", value, "at least 0", "random generator") for value in (-1, 0.0, NAN, True, "0", None)),
    *(("probe_batch_size", value, "at least 1", "examples") for value in (0, -16, 16.0, NAN, True, "16")),
    *(("preset", value, "choose one of", "'paper'", "'authors'") for value in ("papers", "", 1, None)),
    *(("policy", value, "choose one of", "'uniform'", "'proportional'") for value in ("top", "", 1, True)),
    *(("candidate_set", value, "choose one of", "'unsuppressed'", "'suppressed'") for value in ("kept", "")),
    *(("score_step", value, "choose one of", "'additive'", "'sigmoid_gradient'") for value in ("adam", "")),
    *(("rounding", value, "choose one of", "'half_up'", "'truncate'") for value in ("half-up", "")),
    *(("suppression", value, "choose one of", "'response'", "'scaling'") for value in ("scale", 0.25)),
    *(("fused", value, "choose one of", "True", "False") for value in ("yes", None)),
    *(("frozen_dropout", value, "choose one of", "True", "False") for value in ("no", 2)),
    *(
        ("recompute", value, "choose one of", "'none'", "'norms'", "'frozen'", "'all'")
        for value in ("some", True, None)
    ),
    *(("optimizer_state", value, "choose one of", "'keep'", "'reset'", "'offload'") for value in ("cpu", False)),
    *(("cost_exponent", value, "[0, 8]", "exponent") for value in (-0.5, 8.5, NAN, math.inf, True, "1", None)),
]


def message_of(error: pytest.ExceptionInfo[ValueError]) -> str:
    """The message, which must be one line that ends a sentence."""
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize(("name", "value", "said"), [(name, value, said) for name, value, *said in BAD_VALUES])
def test_a_bad_value_is_refused_with_the_value_what_is_allowed_and_the_fix(name, value, said):
    with pytest.raises(ValueError, match=name) as error:
        ISTConfig(**{name: value})
    message = message_of(error)
    assert message.startswith(f"{name}={value!r} is ")
    assert [part for part in said if part not in message] == []


@pytest.mark.parametrize(
    "options",
    [
        {"num_active_layers": 1, "num_unsuppressed_layers": 1},
        {"num_active_layers": 1.0, "num_unsuppressed_layers": 1.0},
        {"num_active_layers": 1e-9},
        {"beta": 0},
        {"beta": 1},
        {"mu": 0},
        {"mu": 1e300},
        {"update_interval": 1, "num_candidates": 2, "seed": 0, "probe_batch_size": 1},
    ],
    ids=str,
)
def test_the_ends_of_each_range_are_allowed(options):
    config = ISTConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize("name", ["num_active_layers", "num_unsuppressed_layers"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_count_above_the_models_layers_is_refused(preset, name):
    options: dict[str, Any] = {name: 9}
    config = ISTConfig(preset=preset, **options)
    with pytest.raises(ValueError, match=name) as error:
        config.layer_counts(8)
    message = message_of(error)
    assert message.startswith(f"{name}=9 is more than the 8 layers")
    assert "a count from 1 to 8, or a fraction" in message


@pytest.mark.parametrize("num_layers", [0, 1])
def test_a_model_without_a_choice_of_layers_is_refused(num_layers):
    with pytest.raises(ValueError, match=rf"has {num_layers} layer\(s\).*at least 2.*put adapters on more") as error:
        ISTConfig().layer_counts(num_layers)
    message_of(error)


def test_an_unknown_option_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"Unknown option betta, lr of ISTConfig: did you mean beta\? Its options are num_active_layers",
    ) as error:
        ISTConfig.from_options(betta=0.5, mu=1.0, lr=1e-4)
    message = message_of(error)
    assert [field.name for field in dataclasses.fields(ISTConfig) if field.name not in message] == []


def test_from_options_equals_the_constructor_and_checks_values():
    options = {"preset": "authors", "mu": 3.0, "seed": 7}
    assert ISTConfig.from_options(**options) == ISTConfig(**options)
    with pytest.raises(ValueError, match="mu=-1"):
        ISTConfig.from_options(mu=-1)


def test_defaults_are_the_papers():
    assert dataclasses.asdict(ISTConfig()) == {
        "num_active_layers": 0.25,
        "num_unsuppressed_layers": 0.5,
        "num_candidates": 3,
        "update_interval": 10,
        "beta": 0.25,
        "mu": 10.0,
        "seed": 0,
        "preset": "paper",
        "policy": "uniform",
        "candidate_set": "unsuppressed",
        "score_step": "additive",
        "rounding": "half_up",
        "suppression": "response",
        "probe_batch_size": None,
        "fused": True,
        "frozen_dropout": False,
        "recompute": "none",
        "optimizer_state": "keep",
        "cost_exponent": 0.0,
    }


OPTION_SETS = {
    "paper": ("uniform", "unsuppressed", "additive", "half_up", "response", None),
    "authors": ("proportional", "suppressed", "sigmoid_gradient", "truncate", "scaling", 16),
}
OPTION_NAMES = ("policy", "candidate_set", "score_step", "rounding", "suppression", "probe_batch_size")


@pytest.mark.parametrize(("preset", "expected"), OPTION_SETS.items())
def test_a_preset_is_a_set_of_options(preset, expected):
    config = ISTConfig(preset=preset)
    assert tuple(getattr(config, name) for name in OPTION_NAMES) == expected
    assert set(PRESETS) == set(OPTION_SETS)


@pytest.mark.parametrize("index", range(len(OPTION_NAMES)), ids=OPTION_NAMES)
@pytest.mark.parametrize(("preset", "other"), [("paper", "authors"), ("authors", "paper")])
def test_each_option_overrides_its_preset_and_no_other(preset, other, index):
    value = OPTION_SETS[other][index] or 4
    options: dict[str, Any] = {OPTION_NAMES[index]: value}
    config = ISTConfig(preset=preset, **options)
    expected = list(OPTION_SETS[preset])
    expected[index] = value
    assert [getattr(config, name) for name in OPTION_NAMES] == expected


def test_a_config_cannot_be_changed_and_round_trips_through_its_fields():
    config = ISTConfig(preset="authors", rounding="half_up", seed=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.mu = 1.0  # type: ignore[misc]
    assert ISTConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("num_layers", "active", "unsuppressed"), [(32, 8, 16), (40, 10, 20), (28, 7, 14), (30, 8, 15)]
)
def test_the_defaults_give_the_counts_of_the_papers_tables_8_and_9(num_layers, active, unsuppressed):
    counts = ISTConfig().layer_counts(num_layers)
    assert counts == LayerCounts(total=num_layers, active=active, unsuppressed=unsuppressed)
    assert counts.distinct_candidates == math.comb(num_layers, unsuppressed)


@pytest.mark.parametrize("num_layers", range(2, 81))
def test_quarter_and_half_are_rounded_as_the_rule_says(num_layers):
    """Whole-number arithmetic: half up is (N + 2) // 4 and (N + 1) // 2, truncating N // 4 and N // 2, and never 0."""

    def counts(**options):
        result = ISTConfig(**options).layer_counts(num_layers)
        return result.active, result.unsuppressed

    quarter_up, half_up = max(1, (num_layers + 2) // 4), (num_layers + 1) // 2
    quarter_down, half_down = max(1, num_layers // 4), num_layers // 2
    assert counts() == (quarter_up, half_up)
    assert counts(rounding="truncate") == (quarter_down, half_down)
    # The authors' code suppresses int(0.5 * N) layers, so an odd model keeps the larger half.
    assert counts(preset="authors") == (quarter_down, num_layers - int(0.5 * num_layers))
    assert counts(preset="authors", rounding="half_up") == (quarter_up, num_layers - half_up)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("num_layers", [2, 3, 4])
@pytest.mark.parametrize("fraction", [1e-6, 0.1, 0.25, 0.5, 0.75, 1.0])
def test_no_fraction_gives_no_layer_or_more_than_there_are(preset, num_layers, fraction):
    config = ISTConfig(preset=preset, num_active_layers=fraction, num_unsuppressed_layers=fraction)
    counts = config.layer_counts(num_layers)
    assert 1 <= counts.active <= num_layers
    assert 1 <= counts.unsuppressed <= num_layers


@pytest.mark.parametrize("eighths", range(1, 9))
def test_other_fractions_are_rounded_exactly(eighths):
    """Eighths are exact in binary, so the counts must be those of exact arithmetic for every size of model."""
    fraction, half = Fraction(eighths, 8), Fraction(1, 2)
    for num_layers in range(2, 81):
        exact = fraction * num_layers
        options: dict[str, Any] = {"num_active_layers": float(fraction), "num_unsuppressed_layers": float(fraction)}
        half_up = ISTConfig(**options).layer_counts(num_layers)
        assert half_up.active == half_up.unsuppressed == max(1, math.floor(exact + half))
        truncated = ISTConfig(**options, rounding="truncate").layer_counts(num_layers)
        assert truncated.active == truncated.unsuppressed == max(1, math.floor(exact))


@pytest.mark.parametrize("num_layers", [2, 5, 8])
def test_counts_pass_through_both_presets(num_layers):
    for preset in PRESETS:
        for count in range(1, num_layers + 1):
            options: dict[str, Any] = {"preset": preset, "num_active_layers": count, "num_unsuppressed_layers": count}
            config = ISTConfig(**options)
            assert config.layer_counts(num_layers) == LayerCounts(num_layers, count, count)


# An old spelling, the present one, and what the warning says.
OLD_NAMES = [
    ({"damping": "scaling"}, {"suppression": "scaling"}, "damping is now suppression"),
    ({"price": 2.0}, {"cost_exponent": 2.0}, "price is now cost_exponent"),
    ({"preset": "reference"}, {"preset": "authors"}, "preset='reference' is now preset='authors'"),
    (
        {"preset": "reference", "price": 1, "mu": 2.0},
        {"preset": "authors", "cost_exponent": 1, "mu": 2.0},
        "price is now",
    ),
]


@pytest.mark.parametrize(
    "make", [ISTConfig, ISTConfig.from_options, lambda **options: resolve_config(None, options, IST)]
)
@pytest.mark.parametrize(("old", "new", "said"), OLD_NAMES)
def test_old_names_are_accepted_with_one_warning(make, old, new, said):
    with pytest.warns(FutureWarning, match=said) as warned:
        config = make(**old)
    assert len(warned) == 1
    assert str(warned[0].message).endswith("the old names work until version 0.2.")
    assert config == ISTConfig(**new)


def test_an_option_under_both_of_its_names_is_refused():
    with pytest.raises(ValueError, match="price is the old name of cost_exponent, and both are given: leave price out"):
        ISTConfig.from_options(price=1.0, cost_exponent=1.0)


def test_presets_are_constructors():
    assert ISTConfig.paper() == ISTConfig()
    assert ISTConfig.authors(mu=3.0) == ISTConfig(preset="authors", mu=3.0)
    assert ISTConfig.authors(rounding="half_up").policy == "proportional"
    with pytest.raises(ValueError, match="Unknown option betta"):
        ISTConfig.authors(betta=1)


def test_the_papers_options_and_how_a_step_is_executed_are_apart():
    """Each option is in one of the two, and together they are the flat keywords of `ISTConfig`."""
    paper, step, whole = (
        [field.name for field in dataclasses.fields(kind)] for kind in (PaperOptions, StepOptions, ISTConfig)
    )
    assert [*paper, *step] == whole
    config = ISTConfig(preset="authors", recompute="all")
    assert isinstance(config, PaperOptions)
    assert isinstance(config, StepOptions)
    assert PaperOptions(preset="authors").policy == config.policy


@pytest.mark.parametrize("field", dataclasses.fields(ISTConfig), ids=lambda field: field.name)
def test_fields_have_plain_defaults_and_none_is_what_the_preset_says(field):
    """A default is the value itself, so that flags and help can be made from it."""
    assert getattr(ISTConfig(), field.name) == field.default
    if field.name in OPTION_NAMES:
        nothing: dict[str, Any] = {field.name: None}
        assert ISTConfig(preset="authors", **nothing) == ISTConfig(preset="authors")


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("num_active_layers", numpy.int64(8), 8),
        ("num_active_layers", numpy.float32(0.5), 0.5),
        ("num_unsuppressed_layers", numpy.uint8(3), 3),
        ("update_interval", numpy.int32(5), 5),
        ("num_candidates", numpy.int16(4), 4),
        ("seed", numpy.int64(7), 7),
        ("probe_batch_size", numpy.int64(2), 2),
        ("beta", numpy.float32(0.5), 0.5),
        ("mu", numpy.int64(3), 3),
        ("cost_exponent", numpy.float64(1.0), 1.0),
        ("fused", numpy.bool_(False), False),
        ("recompute", numpy.str_("all"), "all"),
    ],
)
def test_numpys_numbers_are_numbers(name, value, plain):
    """They become Python's own, which histories and checkpoints can write."""
    options: dict[str, Any] = {name: value}
    found = getattr(ISTConfig(**options), name)
    assert found == plain
    assert type(found) is type(plain)
    json.dumps(dataclasses.asdict(ISTConfig(**options)))


@pytest.mark.parametrize("value", [numpy.bool_(True), numpy.float64(8.0), numpy.int64(0)])
def test_numpys_numbers_are_checked_as_pythons(value):
    with pytest.raises(ValueError, match=r"update_interval=.* is not a whole number of at least 1"):
        ISTConfig(update_interval=value)
