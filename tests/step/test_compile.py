"""Blocks compiled one by one: few graphs however often the active layers change, and the same training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from ist import SparseTuner
from ist.step.fused import frozen as fused_frozen
from ist.step.fused import function, precision
from tests.helpers.tiny import snapshot, tiny_batches, tiny_lora

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler's own calls
NUM_LAYERS = 6
MAX_GRAPHS = 4
"""Frozen and active, with and without a gradient of the input."""


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    counters.clear()
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def compiled(backend: str | None, dropout: float = 0.0) -> Any:
    """A model whose blocks are compiled one by one."""
    torch.manual_seed(0)
    model = tiny_lora(NUM_LAYERS, lora_dropout=dropout).train()
    blocks: Any = model.get_submodule("base_model.model.model.layers")
    if backend:
        for block in blocks:
            block.compile(backend=backend, fullgraph=True)
    return model


def train(steps: int, model: Any, **options: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The adapters after some steps of sparse tuning, and what the layers' importance is then."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batches = [{name: value[:, :8] for name, value in batch.items()} for batch in tiny_batches(4)]
    with SparseTuner(model, num_active_layers=2, update_interval=5, probe_batches=batches, **options) as tuner:
        chosen = set()
        for i in range(steps):
            chosen.add(tuner.begin_step())
            model(**batches[i % 4], use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tuner.end_step(optimizer)
        assert len(chosen) > min(steps, 12) // 3
        assert tuner.num_fused > 0
        return snapshot(model), list(tuner.selector.state_dict()["importance"])


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("recompute", ["none", "frozen"])
def test_few_graphs_over_200_steps(dropout: float, recompute: str) -> None:
    with torch._dynamo.config.patch(error_on_recompile=False, fail_on_recompile_limit_hit=True):
        train(200, compiled("aot_eager", dropout), recompute=recompute)
    assert 0 < counters["stats"]["unique_graphs"] <= MAX_GRAPHS
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_padded_batches_of_many_lengths_stay_compiled(dynamic: bool | None) -> None:
    """More graphs than PyTorch allows by itself, but no more with every new length."""
    model = tiny_lora(NUM_LAYERS, lora_dropout=0.1).train()
    blocks: Any = model.get_submodule("base_model.model.model.layers")
    for block in blocks:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    batches = []
    for number, batch in enumerate(tiny_batches(10)):
        batch = {name: value[:, : 6 + number] for name, value in batch.items()}
        mask = torch.ones_like(batch["input_ids"])
        mask[0, : number % 2] = 0
        batches.append({**batch, "attention_mask": mask})
    probes = [{name: value[:1] for name, value in batch.items()} for batch in batches]
    graphs = []
    with (
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
        SparseTuner(model, num_active_layers=2, update_interval=5, probe_batches=probes) as tuner,
    ):
        for step in range(80):
            tuner.begin_step()
            model(**batches[step % 10], use_cache=False).loss.backward()
            model.zero_grad()
            tuner.end_step()
            graphs.append(counters["stats"]["unique_graphs"])
    assert MAX_GRAPHS < graphs[-1] == graphs[39] <= 4 * MAX_GRAPHS
    assert not counters["recompile_limit"]


@pytest.mark.slow
def test_probes_need_no_graphs_where_they_are_measured_at_once() -> None:
    """Nor do probes of another length than that of training make its graphs those of any length."""
    graphs = []
    for interval, length in ((1000, 8), (2, 8), (2, 5)):
        torch._dynamo.reset()
        counters.clear()
        probes = [{name: value[:1, :length] for name, value in tiny_batches(1)[0].items()}]
        model = compiled("aot_eager")
        with SparseTuner(model, num_active_layers=2, update_interval=interval, probe_batches=probes) as tuner:
            for batch in tiny_batches(16):
                tuner.begin_step()
                model(**{name: value[:, :8] for name, value in batch.items()}, use_cache=False).loss.backward()
                model.zero_grad()
                tuner.end_step()
        assert (tuner.last_update is not None) == (interval == 2)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [MAX_GRAPHS] * 3


def test_the_limit_of_graphs_is_raised_for_compiled_layers_alone() -> None:
    config = torch._dynamo.config
    before = config.recompile_limit
    SparseTuner(compiled(None), probe_batches=[]).close()
    assert config.recompile_limit == before
    SparseTuner(compiled("aot_eager"), probe_batches=[]).close()
    assert config.recompile_limit >= 64
    config.recompile_limit = 100
    SparseTuner(compiled("aot_eager"), probe_batches=[]).close()
    assert config.recompile_limit == 100


@pytest.mark.parametrize("recompute", [pytest.param("none", marks=pytest.mark.slow), "frozen"])
def test_the_training_is_the_same(recompute: str) -> None:
    adapters, scores = train(20, compiled("aot_eager"), recompute=recompute)
    expected, expected_scores = train(20, compiled(None))
    assert adapters.keys() == expected.keys()
    for name, value in adapters.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert scores == pytest.approx(expected_scores, rel=1e-4)


@pytest.mark.parametrize("use_cache", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrapped", [False, True], ids=["block.compile()", "torch.compile(block)"])
def test_frozen_blocks_compute_twice_and_are_left_as_they_were(wrapped: bool, use_cache: bool) -> None:
    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        return lambda *given: calls.append(graph) or graph(*given)

    model = compiled(None)
    blocks: Any = model.get_submodule("base_model.model.model.layers")
    for index, block in enumerate(blocks):
        block.compile(backend=backend) if not wrapped else blocks.__setitem__(
            index, torch.compile(block, backend=backend)
        )
    parts = [part for block in blocks for part in (block, getattr(block, "_orig_mod", block))]
    before = [{**vars(part)} for part in parts]
    gradients = []
    for recompute in ("none", "frozen"):
        calls.clear()
        with SparseTuner(model, selector="fixed:2,4", recompute=recompute, probe_batches=[]) as tuner:
            tuner.begin_step()
            model(**tiny_batches(1)[0], use_cache=use_cache).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        assert len(calls) == NUM_LAYERS + (2 if recompute == "frozen" else 0)
    assert len(gradients[0]) == 16
    assert all(map(torch.equal, *gradients))
    assert [{**vars(part)} for part in parts] == before


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "frozen"])
def test_products_of_parts_break_no_graph(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does with float32 adapters on a bfloat16 model."""
    for module in (function, fused_frozen):
        monkeypatch.setattr(module, "products", lambda *_: precision.Split())
    monkeypatch.setattr(precision, "wide_product", lambda left, right: left.float() @ right.float())
    model = compiled("aot_eager", dropout=0.2)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    train(30, model, recompute=recompute)
    assert 0 < counters["stats"]["unique_graphs"] <= MAX_GRAPHS
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_second_training_needs_no_more_graphs() -> None:
    model = compiled("aot_eager")
    for _ in range(3):
        train(20, model)
    assert 0 < counters["stats"]["unique_graphs"] <= MAX_GRAPHS


@pytest.mark.slow
def test_the_default_compiler_takes_the_function_of_lora() -> None:
    """Inductor, as `block.compile()` uses it."""
    adapters, _ = train(6, compiled("inductor"))
    expected, _ = train(6, compiled(None))
    assert adapters.keys() == expected.keys()
    for name, value in adapters.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
