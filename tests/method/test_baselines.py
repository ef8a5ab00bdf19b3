"""One word changed: every way of choosing layers through one loop, what moves in it, and that it resumes exactly."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

from ist import IST, FixedSelector, ISTConfig, SparseTuner
from ist.method.registry import SELECTORS, LiftSelector, LisaSelector, fixed_layers, make_selector, selector_factory
from ist.runs.scores import extreme_layers, read_scores
from tests.helpers.tiny import layer_of, moved_layers, snapshot, tiny_batches, tiny_llama, tiny_lora, trainable

STEPS = 20


def tiny_dora() -> nn.Module:
    return tiny_lora(use_dora=True)


def tiny_adalora() -> nn.Module:
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=6, total_step=STEPS, target_modules=["q_proj", "v_proj", "up_proj"]
    )
    return get_peft_model(tiny_llama(), config)


# fmt: off
METHODS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "IST": (tiny_lora, {"selector": "ist"}),
    "random": (tiny_lora, {"selector": "random"}),
    "vanilla LoRA": (tiny_lora, {"selector": "all"}),
    "LISA": (tiny_llama, {"selector": "lisa"}),
    "full": (tiny_llama, {"selector": "full"}),
    "LIFT, front to end": (tiny_lora, {"selector": "lift-front-to-end"}),
    "LIFT, end to front": (tiny_lora, {"selector": "lift-end-to-front"}),
    "LIFT, random": (tiny_lora, {"selector": "lift-random"}),
    "LIFT, whole layers": (tiny_llama, {"selector": "lift-front-to-end"}),
    "fixed by index": (tiny_lora, {"selector": "fixed:1,3"}),
    "fixed by name": (tiny_lora, {"selector": "fixed:layers.0,layers.2"}),
    "fixed at random": (tiny_lora, {"selector": "fixed:random"}),
    "fixed, whole layers": (tiny_llama, {"selector": "fixed:0"}),
    "a factory's, whole layers": (tiny_llama, {"selector": partial(FixedSelector, layers=[2])}),
    "DoRA": (tiny_dora, {"selector": "all"}),
    "DoRA + IST": (tiny_dora, {"selector": "ist"}),
    "AdaLoRA": (tiny_adalora, {"selector": "all"}),
    "AdaLoRA + IST": (tiny_adalora, {"selector": "ist"}),
}
# fmt: on


class Run:
    """The loop, the same for all."""

    def __init__(self, make: Callable[[], nn.Module], options: dict[str, Any], state: Any = None) -> None:
        self.model: Any = make()
        if state:
            self.model.load_state_dict(state["model"])
        self.optimizer = torch.optim.AdamW(trainable(self.model), lr=0.01, weight_decay=0.5)
        self.tuner = SparseTuner(
            self.model,
            num_active_layers=2,
            update_interval=4,
            seed=3,
            probe_batches=tiny_batches(3, seed=9),
            **options,
        )
        if state:
            self.optimizer.load_state_dict(state["optimizer"])
            self.tuner.load_state_dict(json.loads(state["tuner"]))
        self.sets: list[set[int]] = []

    def state(self) -> dict[str, Any]:
        return {
            "model": copy.deepcopy(self.model.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "tuner": json.dumps(self.tuner.state_dict()),
        }

    def train(self, batches: list[Any], check: bool = False) -> None:
        for batch in batches:
            active = set(self.tuner.begin_step())
            before = snapshot(self.model) if check else {}
            self.model(**batch).loss.backward()
            if check:
                graded = {layer_of(name) for name, p in self.model.named_parameters() if p.grad is not None}
                assert graded - {None} == active
            self.optimizer.step()
            if check:
                assert moved_layers(before, snapshot(self.model)) - {None} == active
            self.tuner.after_optimizer_step()
            self.optimizer.zero_grad()
            self.tuner.end_step(self.optimizer)
            self.sets.append(active)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_through_the_loop_and_resumes_to_the_bit(name: str) -> None:
    make, options = METHODS[name]
    batches = tiny_batches(STEPS)
    whole = Run(make, options)
    start = snapshot(whole.model)
    whole.train(batches[:7], check=True)
    saved = whole.state()
    whole.train(batches[7:], check=True)
    resumed = Run(make, options, saved)
    resumed.train(batches[7:])
    assert whole.sets[7:] == resumed.sets
    if make is tiny_adalora:  # No checkpoint holds AdaLoRA's sensitivities: the ranks that go may be others.
        assert ranks_left(whole.model) == ranks_left(resumed.model) == 2 * 12
    else:
        assert moved_layers(snapshot(whole.model), snapshot(resumed.model)) == set()
    trained = set().union(*whole.sets)
    assert moved_layers(start, snapshot(whole.model)) - {None} == trained
    # What is outside of the layers trains where whole layers do.
    assert (None in moved_layers(start, snapshot(whole.model))) == (make is tiny_llama)
    for run in (whole, resumed):
        run.tuner.close()


def ranks_left(model: nn.Module) -> int:
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)


RESUMED_AS_ANOTHER = [
    ("lisa", "full", tiny_llama, "The run began with LisaSelector and would resume with FullSelector"),
    ("lift-random", "lift-end-to-front", tiny_lora, "began with lift-random and would resume with lift-end-to-front"),
    ("fixed:0,1", "fixed:random", tiny_lora, "The run began with the layers [0, 1] and would resume with"),
    ("random", "all", tiny_lora, "The run began with RandomSelector and would resume with EverySelector"),
]


@pytest.mark.parametrize(("began", "goes_on", "make", "message"), RESUMED_AS_ANOTHER)
def test_a_run_is_not_resumed_as_another(began: str, goes_on: str, make: Any, message: str) -> None:
    with SparseTuner(make(), selector=began, num_active_layers=2, seed=1) as tuner:
        state = tuner.state_dict()
    with (
        SparseTuner(make(), selector=goes_on, num_active_layers=2, seed=1) as tuner,
        pytest.raises(ValueError) as error,  # noqa: PT011
    ):
        tuner.load_state_dict(state)
    assert message in str(error.value)


# ---- The choices themselves


def choices(selector: Any, steps: int) -> list[tuple[int, ...]]:
    return [selector.choose(step) for step in range(steps)]


# fmt: off
WINDOWS: list[tuple[str, int, int, list[tuple[int, ...]]]] = [
    ("front-to-end", 1, 4, [(0,), (1,), (2,), (3,), (0,)]),
    ("end-to-front", 1, 4, [(3,), (2,), (1,), (0,), (3,)]),
    ("front-to-end", 2, 5, [(0, 1), (2, 3), (4,), (0, 1)]),
    ("end-to-front", 2, 5, [(3, 4), (1, 2), (0,), (3, 4)]),
    ("front-to-end", 4, 4, [(0, 1, 2, 3), (0, 1, 2, 3)]),
]
# fmt: on


@pytest.mark.parametrize(("order", "size", "layers", "expected"), WINDOWS)
def test_lift_goes_through_the_layers(order: Any, size: int, layers: int, expected: list[tuple[int, ...]]) -> None:
    selector = LiftSelector(ISTConfig(num_active_layers=size, update_interval=3), layers, order)
    assert choices(selector, 3 * len(expected)) == [window for window in expected for _ in range(3)]


def test_lift_at_random_takes_each_layer_once_a_sweep_in_another_order_each_time() -> None:
    selector = LiftSelector(ISTConfig(num_active_layers=2, update_interval=1), 8, "random")
    sweeps = [choices(selector, 40)[start : start + 4] for start in range(0, 40, 4)]
    assert all(sorted(layer for window in sweep for layer in window) == list(range(8)) for sweep in sweeps)
    assert len({tuple(sweep) for sweep in sweeps}) > 5
    other = LiftSelector(ISTConfig(num_active_layers=2, update_interval=1, seed=1), 8, "random")
    assert choices(other, 40) != choices(selector, 40)


def test_lift_knows_its_orders() -> None:
    with pytest.raises(ValueError, match="order='back-to-front' is unknown: choose one of 'front-to-end'"):
        LiftSelector(ISTConfig(), 8, "back-to-front")  # type: ignore[arg-type]


def test_lisa_draws_each_layer_alike() -> None:
    selector = LisaSelector(ISTConfig(num_active_layers=2, update_interval=5), 8)
    drawn = [selector.choose(step) for step in range(0, 20_000, 5)]
    counts = [sum(layer in chosen for chosen in drawn) for layer in range(8)]
    # 4000 draws of 2 of 8: 1000 each, with a standard deviation of 27.
    assert all(abs(count - 1000) < 4 * 27.4 for count in counts)


NAMES = [f"base_model.model.model.layers.{i}" for i in range(12)]

# fmt: off
FIXED: list[tuple[str, tuple[int, ...] | str]] = [
    ("0,3,5", (0, 3, 5)),
    (" 5, 0 ,5,", (0, 5)),
    ("layers.1,layers.11", (1, 11)),
    (NAMES[2], (2,)),
    ("model.layers.4,7", (4, 7)),
    ("12", "The fixed layer '12' is no layer of this model, whose layers are 0 (base_model.model.model.layers.0) to"),
    ("h.1", "The fixed layer 'h.1' is no layer"),
    ("-1", "The fixed layer '-1' is no layer"),
    ("best", "The fixed layer 'best' is no layer of this model"),
    (" , ", "name no layer: give indices (0,3,5), names of blocks (layers.0,layers.3), random, top:FILE or"),
    ("top:", "The fixed layer 'top:' is no layer"),
    ("top:nothing.json", "nothing.json does not exist: give a JSON file of scores, or the history of a run."),
]
# fmt: on


@pytest.mark.parametrize(("text", "expected"), FIXED, ids=[text for text, _ in FIXED])
def test_what_fixed_layers_mean(text: str, expected: tuple[int, ...] | str) -> None:
    if isinstance(expected, tuple):
        assert fixed_layers(text, ISTConfig(), NAMES) == expected
        return
    with pytest.raises(ValueError) as error:  # noqa: PT011
        fixed_layers(text, ISTConfig(), NAMES)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_that_two_stacks_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"The fixed layer 'block\.0' is not one layer of this model"):
        fixed_layers("block.0", ISTConfig(), ["encoder.block.0", "encoder.block.1", "decoder.block.0"])


def test_fixed_at_random_is_drawn_once_from_the_seed() -> None:
    sets = {seed: fixed_layers("random", ISTConfig(num_active_layers=3, seed=seed), NAMES) for seed in range(20)}
    assert all(len(chosen) == len(set(chosen)) == 3 for chosen in sets.values())
    assert len(set(sets.values())) > 10
    selector = make_selector(selector_factory("fixed:random"), ISTConfig(num_active_layers=3, seed=7), NAMES)
    assert set(choices(selector, 50)) == {sets[7]}


@pytest.mark.parametrize("text", ["fixed", "fixed:"])
def test_fixed_needs_layers(text: str) -> None:
    with pytest.raises(ValueError, match="selector='fixed' needs layers, as in 'fixed:0,3,5'"):
        IST(selector=text)


def test_unknown_names_are_refused_with_all_that_are_known() -> None:
    with pytest.raises(ValueError, match="selector='lift' is unknown: choose one of") as error:
        selector_factory("lift")
    assert all(repr(name) in str(error.value) for name in (*SELECTORS, "fixed:LAYERS"))


# ---- Scores in files

SCORES = [0.1, 3.0, -1.0, 3.0, 0.0, 0.2, 0.3, -2.0, 0.4, 0.5, 0.6, 0.7]


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(1, True, (1,)), (3, True, (1, 3, 11)), (2, False, (2, 7)), (3, False, (2, 4, 7)), (12, True, tuple(range(12)))],
)
def test_the_layers_at_either_end(count: int, most: bool, expected: tuple[int, ...]) -> None:
    assert extreme_layers(SCORES, count, most) == expected


def write(folder: Path, content: Any) -> Path:
    file = folder / "scores.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


@pytest.mark.parametrize(
    "content",
    [
        SCORES,
        {"importance": SCORES},
        {"true_importance": SCORES, "layers": NAMES},
        {"scores": SCORES, "layers": [name.removeprefix("base_model.model.") for name in NAMES], "note": "x"},
    ],
    ids=["a list", "importance", "true importance with names", "scores with names of the base model"],
)
def test_scores_from_json(tmp_path: Path, content: Any) -> None:
    file = write(tmp_path, content)
    assert read_scores(file, NAMES) == SCORES
    assert fixed_layers(f"top:{file}", ISTConfig(num_active_layers=3), NAMES) == (1, 3, 11)
    assert fixed_layers(f"bottom:{file}", ISTConfig(num_active_layers=2), NAMES) == (2, 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2", "scores.json is not JSON"),
        ({"weights": [1]}, "scores.json holds no scores: a list of numbers, or an object with importance or"),
        ([1.0, 2.0], "scores.json has 2 scores, and this model has 12 layers"),
        ([*SCORES[:-1], None], "scores.json has scores that are not finite numbers"),
        ({"scores": SCORES, "layers": NAMES[::-1]}, "and this model has 12 (base_model.model.model.layers.0, …)"),
    ],
)
def test_scores_that_are_not_this_models(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_scores(write(tmp_path, content), NAMES)
    assert message in str(error.value)


def test_scores_from_the_history_of_a_run(tmp_path: Path) -> None:
    from ist import History

    history = History(tmp_path / "ist_history.jsonl")
    with SparseTuner(
        tiny_lora(), num_active_layers=2, update_interval=1, probe_batches=tiny_batches(3), history=history
    ) as tuner:
        for _ in range(2):
            tuner.begin_step()
            tuner.end_step()
        names = [layer.name for layer in tuner.layers]
        assert tuner.last_update is not None
        learned = list(tuner.last_update.importance)
    assert read_scores(tmp_path, names) == read_scores(tmp_path / "ist_history.jsonl", names) == learned
    with SparseTuner(tiny_lora(), num_active_layers=2, selector=f"fixed:top:{tmp_path}") as tuner:
        assert tuner.begin_step() == extreme_layers(learned, 2)
    with SparseTuner(
        tiny_lora(), selector="random", num_active_layers=2, history=History(tmp_path / "other.jsonl")
    ) as tuner:
        tuner.begin_step()
    with pytest.raises(ValueError, match="holds no importance: its run measured nothing"):
        read_scores(tmp_path / "other.jsonl", names)
