"""Every method of the plans of focused training, in a few steps of a tiny model, and what each leaves in its line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ist import layer_scores
from ist.experiments.evaluation.scoring import Continuations
from ist.method.spreading import choose_layers
from tests.helpers.tiny import VOCABULARY, tiny_batches, tiny_llama

PATH = [*sys.path]
sys.path.insert(0, str(Path(__file__).parents[1]))

from quality import focusing, plan, tasks, train  # noqa: E402

sys.path[:] = PATH  # as other tests expect it

PLANS = sorted((Path(__file__).parent / "plans").glob("focused*.yaml"))
NEW = [Path(__file__).parent / "plans" / f"focused-{name}.yaml" for name in ("scaling", "init", "depth", "second")]
NEW.append(NEW[0].with_name("focused-normalised.yaml"))
SMALL = {"steps": 4, "batch_size": 2, "rank": 4, "alpha": 8, "points": 0, "dropout": 0.0}
CPU = torch.device("cpu")
NUM_LAYERS = 8


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_llama(NUM_LAYERS)


@pytest.fixture(scope="module")
def task() -> tasks.Prepared:
    """Sequences that count upwards; no tests, which are no matter of the method."""
    rows = [Continuations(tuple((n + i) % VOCABULARY for i in range(7)), 1, ((n + 7) % VOCABULARY,)) for n in range(24)]
    return tasks.Prepared("counting", rows[:20], rows[20:], {}, {"train": 20})


def methods_of(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Each distinct method of these plans by its name."""
    return {name: method for file in files for name, method in plan.read_plan(file)["methods"].items()}


def training_of(method: dict[str, Any], **setting: Any) -> dict[str, Any]:
    """One training of a method, with the plan's options and the setting of a test."""
    options = {name: value for name, value in method.items() if name not in ("rate_of", "rates", "training")}
    full = {**plan.TRAINING, **SMALL, **setting}
    return {
        "kind": "training", "task": "counting", "options": options, "setting": full, "steps": full["steps"],
        "learning_rate": 1e-2, "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize("name", methods_of(NEW))
def test_every_method_trains(name: str, base: Any, task: tasks.Prepared) -> None:
    training = training_of(methods_of(NEW)[name])
    found = train.train(training, base, None, task, CPU)
    options = training["options"]
    assert found["curve"][-1][0] == 4
    assert found["curve"][-1][2] < 4.3, "not worse than at the start, log(64) = 4.16"
    focus = found.get("focus")
    assert bool(focus) == bool({"focus", "warm_start"} & set(options))
    if focus:
        share = options.get("focus", {}).get("num_layers", 1.0)
        share *= options["warm_start"].get("num_layers", 0.5) if "warm_start" in options else 1.0
        assert len(focus["layers"]) == NUM_LAYERS * share
        lowest = options.get("focus", {}).get("min_depth", 0)
        assert min(focus["layers"]) >= lowest * NUM_LAYERS
        assert set(focus["layers"]) <= set(focus.get("first", range(NUM_LAYERS)))
    if options["selector"] in ("ist", "random"):
        assert len(found["choices"]) == 4, "sampled among the focused layers alone"
        assert sum(found["choices"]) == 2 * 4


def test_the_scalings_of_alpha_are_the_three(base: Any, task: tasks.Prepared) -> None:
    alphas = {}
    for name, method in methods_of([NEW[0]]).items():
        _, focus = train.make_model(training_of(method), base, task, CPU)
        alphas[name] = focus and (focus["ranks"], focus["alpha"])
    assert alphas == {
        "all layers": None,
        "half, kept": ([8], 8),
        "half, sqrt": ([8], pytest.approx(8 * 2**0.5)),
        "half, linear": ([8], 16),
        "quarter, kept": ([16], 8),
        "quarter, sqrt": ([16], 16),
        "quarter, linear": ([16], 32),
    }


def test_a_start_from_the_gradient_keeps_the_function_and_changes_a(base: Any, task: tasks.Prepared) -> None:
    models = []
    for init in ("random", "gradient"):
        training = training_of({"selector": "all", "init": init})
        model, _ = train.make_model(training, base, task, CPU)
        focusing.start_adapters(model, init, train.probe_batches(task, training), 0)
        models.append(model.eval())
    (batch,) = tiny_batches(1)
    assert torch.equal(models[0](**batch).logits, models[1](**batch).logits)
    drawn, set_to = (model.state_dict() for model in models)
    changed = {name for name in drawn if not torch.equal(drawn[name], set_to[name])}
    assert changed == {name for name in drawn if "lora_A" in name}
    with pytest.raises(ValueError, match="init='svd' is unknown: it is random or gradient"):
        focusing.start_adapters(models[0], "svd", [], 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"normalise": "activations"}, lambda scores, norms: [s / n**2 for s, n in zip(scores, norms, strict=True)]),
        ({"last": 0.5}, lambda scores, norms: [*scores[:-1], scores[-1] / 2]),
    ],
    ids=["by activations", "last halved"],
)
def test_scores_are_put_in_relation(options: dict[str, Any], expected: Any, base: Any) -> None:
    config, batches = LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), tiny_batches(2)
    scores = layer_scores(base, config, batches)
    norms = layer_scores(base, config, batches, criterion="activation")
    _, told = focusing.chosen_focus(base, config, {"num_layers": 4, **options}, batches, 0)
    assert told["scores"] == pytest.approx(expected(scores, norms), rel=1e-5)
    for wrong in ({"normalise": "rank"}, {"normalise": "activations", "criterion": "first_step"}):
        with pytest.raises(ValueError, match="is unknown: it is weights, with the gradient activations, or left out"):
            focusing.chosen_focus(base, config, wrong, batches, 0)


def test_by_activations_is_the_librarys_relative_gradient(base: Any) -> None:
    config, batches = LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), tiny_batches(2)
    told = [
        focusing.chosen_focus(base, config, {"num_layers": 2, **options}, iter(batches), 0)[1]
        for options in ({"normalise": "activations"}, {"criterion": "relative_gradient"})
    ]
    assert told[0]["scores"] == told[1]["scores"]
    assert told[0]["layers"] == told[1]["layers"]
    _, last = focusing.chosen_focus(base, config, {"normalise": "activations", "last": 0.5}, batches, 0)
    assert last["scores"] == [*told[0]["scores"][:-1], pytest.approx(told[0]["scores"][-1] / 2, rel=1e-5)]


def test_the_ids_of_trainings_by_activations_are_those_of_the_results() -> None:
    """Which were made before the library had the criterion."""
    files = sorted((Path(__file__).parent / "results").glob("focused*qwen*.jsonl"))
    lines = {line["id"]: line for file in files for line in map(json.loads, file.read_text().splitlines())}
    known = {each for each in lines if "/by activations, " in each}
    plans = [plan.read_plan(PLANS[0].with_name(f"focused-{name}.yaml")) for name in ("normalised", "more")]
    planned = {training["id"] for own in plans for training in plan.expand(own, lines, {}).trainings}
    assert known < planned
    assert len(known) == 17


def test_a_second_choice_is_among_the_focused_layers_and_the_others_stay(base: Any) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1, 2, 4, 7], init_lora_weights=False)
    torch.manual_seed(0)
    model: Any = get_peft_model(tiny_llama(NUM_LAYERS), config)
    batches = tiny_batches(2)
    scores = layer_scores(model, None, batches, criterion="gate")
    told = focusing.WarmStart({"share": 0.5}, 10).narrow(model, batches, 0)
    assert told["layers"] == [(1, 2, 4, 7)[index] for index in choose_layers(scores, 2)]
    assert told["after"] == 5
    trained = {name.split(".layers.")[1][0] for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {str(layer) for layer in told["layers"]}


def test_the_plans_of_scaling_keep_out_of_the_others() -> None:
    """Its finer rates would change which rate of a method is the best one."""
    scaling = plan.read_plan(NEW[0])
    others = methods_of([file for file in PLANS if plan.read_plan(file)["study"] == "focused"])
    assert len(others) > 20
    assert scaling["study"] == "scaling"
    assert not set(scaling["methods"]) & set(others)
    assert json.dumps(scaling["methods"]["half, sqrt"]["focus"]) == '{"num_layers": 0.5, "scaling": "sqrt"}'
