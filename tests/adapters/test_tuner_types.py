"""Every tuner type of the installed peft is decided on: it works, as measured here, or is refused with a reason."""

from __future__ import annotations

import pytest
from peft import PeftType

from ist import SparseTuner
from ist.adapters.layers import discover_layers
from tests.helpers.tiny import traces
from tests.helpers.tuner_types import (
    METHODS,
    REFUSALS,
    TUNERS,
    Method,
    adapt,
    forward_error,
    is_available,
    make_adapted,
    make_base,
    moves_active_layers_only,
    saves_and_loads,
    uses_factor,
)

TOLERANCE = 1e-12  # relative to the response, in float64; the promise is 1e-5

# What peft says of layers that it has not met, of unused options and of its own deprecations is not at issue.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")

methods = pytest.mark.parametrize("entry", METHODS.values(), ids=METHODS)


@pytest.fixture(autouse=True)
def skip_without_package(request: pytest.FixtureRequest) -> None:
    entry = request.node.callspec.params.get("entry") if hasattr(request.node, "callspec") else None
    if isinstance(entry, Method) and not is_available(entry):
        pytest.skip(f"peft's implementation needs {entry.needs}")


def test_every_tuner_type_of_the_installed_peft_is_decided_on() -> None:
    """One that a later peft adds belongs into `tuner_types.TUNERS`: as a method, or as a refusal with a reason."""
    known = {str(kind.name) for kind in PeftType} - {"BOTTLENECK"}
    assert known == set(TUNERS)


@methods
def test_the_response_is_scaled_exactly(entry: Method) -> None:
    assert forward_error(entry) < TOLERANCE


@methods
def test_a_factor_is_used_where_there_is_one(entry: Method) -> None:
    assert uses_factor(entry) is entry.factor


@pytest.mark.parametrize("weight_decay", [None, 0.1], ids=["gradient descent", "AdamW"])
@methods
def test_only_active_layers_move(entry: Method, weight_decay: float | None) -> None:
    assert moves_active_layers_only(entry, weight_decay)


@methods
def test_a_saved_adapter_is_loaded_by_peft(entry: Method) -> None:
    assert saves_and_loads(entry)


@methods
def test_afterwards_the_model_is_as_peft_made_it(entry: Method) -> None:
    model = make_adapted(entry)
    before = traces(model)
    with SparseTuner(model, num_active_layers=2, probe_batches=[{}]) as tuner:
        tuner.begin_step()
    assert traces(model) == before


@pytest.mark.parametrize(("name", "entry"), REFUSALS.items(), ids=REFUSALS)
def test_a_refusal_says_why_and_what_to_use(name: str, entry: Method) -> None:
    model = adapt(entry, make_base())
    before = traces(model)
    with pytest.raises(ValueError, match=REFUSALS[name].reason) as caught:
        discover_layers(model)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    assert "such as LoRA" in message
    assert traces(model) == before
