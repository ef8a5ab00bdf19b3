"""Memory and time on paper: equal to what PyTorch counts, what a GPU held, and what synthetic steps were made of."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

PATH = [*sys.path]
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import bytes_on_paper  # noqa: E402
import model  # noqa: E402
import paper_tables  # noqa: E402
import scaling  # noqa: E402
from build import materialise, weightless  # noqa: E402

sys.path[:] = PATH  # as other tests expect it

INFINITE = float("inf")


# --- memory on paper


@pytest.mark.parametrize(
    ("shape", "parts"), [((8, 3), [4, 4]), ((5, 3), [3, 2]), ((3,), [1, 1, 1, 0]), ((5,), [2, 2, 1, 0])]
)
def test_parts_of_a_tensor_are_those_of_chunk(shape: tuple[int, ...], parts: list[int]) -> None:
    found = [bytes_on_paper.shard_shape(shape, rank, len(parts)) for rank in range(len(parts))]
    assert [part[0] for part in found] == parts
    chunks = [tuple(chunk.shape) for chunk in torch.empty(shape).chunk(len(parts))]
    assert found[: len(chunks)] == chunks


@pytest.mark.parametrize("method", ["lora", "sampled", "focused"])
def test_shards_add_up_to_the_whole(method: str) -> None:
    whole = bytes_on_paper.state_bytes("tiny", method, "none", 1)[0]
    ranks = bytes_on_paper.state_bytes("tiny", method, "fsdp2", 8)
    for name in ("base", "adapters"):
        assert sum(rank[name] for rank in ranks) == whole[name]
    assert bytes_on_paper.state_bytes("tiny", method, "ddp", 2) == [whole] * 2


def test_the_largest_shape_has_as_many_weights_as_its_name_says() -> None:
    one, two = (
        sum(p.numel() for p in weightless("70b", "lora", layers).parameters() if not p.requires_grad)
        for layers in (1, 2)
    )
    assert one + (bytes_on_paper.num_layers("70b") - 1) * (two - one) == pytest.approx(69.0e9, rel=0.01)


def test_activations_on_paper_are_those_that_a_gpu_held() -> None:
    """LLaMA-7B's shape, 16 × 256 tokens, on an H100: what the benchmark of step time measured."""
    results = [json.loads(file.read_text()) for file in (HERE.parent / "step_time" / "results").glob("*.json")]
    measured = [
        result["rows"]["LoRA"]["activation_gib"]
        for result in results
        if result["kind"] == "step_time"
        and not result["device"].startswith("CPU")
        and (result["config"]["size"], result["config"]["rows"], result["config"]["tokens"]) == ("7b", 16, 256)
        and not result["config"].get("layers")
        and result["rows"].get("LoRA", {}).get("activation_gib")
    ]
    assert measured
    paper = bytes_on_paper.activation_bytes("7b", "lora", 16, 256) / 2**30
    for values in measured:
        assert paper == pytest.approx(values[0], rel=0.05)


# --- the model


@pytest.mark.parametrize(
    "machine",
    [
        model.Machine(4e14, 1e11, 0.02),
        model.Machine(4e14, 1e11, 0.0),
        model.Machine(4e14, INFINITE, 0.02),
        model.Machine(4e14, INFINITE, 0.0),
    ],
)
def test_the_fit_finds_the_machine_that_made_the_steps(machine: model.Machine) -> None:
    sizes = [(1e13, 0.0), (2e13, 0.0), (2e13, 5e9), (4e13, 5e9), (4e13, 4e10)]
    steps = [model.Work(flops, received, model.predict(machine, flops, received)[1]) for flops, received in sizes]
    found = model.fit(steps)
    assert found.flops == pytest.approx(machine.flops)
    assert found.bandwidth == pytest.approx(machine.bandwidth)
    assert found.overhead == pytest.approx(machine.overhead, abs=1e-9)


def test_one_step_gives_a_rate_and_none_is_an_error() -> None:
    assert model.fit([model.Work(1e12, 0.0, 0.5)]) == model.Machine(pytest.approx(2e12), INFINITE, 0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no measured step"):
        model.fit([])


def test_without_cost_of_bytes_a_step_is_its_computation() -> None:
    assert model.predict(model.Machine(1e12, INFINITE), 2e12, 1e15) == (2.0, 2.0)
    assert model.predict(model.Machine(INFINITE, 1e9, 0.5), 2e12, 3e9) == (3.5, 3.5)
    assert model.predict(model.Machine(1e12, 1e9), 2e12, 3e9) == (3.0, 5.0)


@pytest.mark.parametrize("method", ["lora", "focused"])
def test_the_work_of_a_step_is_what_pytorch_counts(method: str) -> None:
    adapted: Any = weightless("tiny", method)
    materialise(adapted, torch.device("cpu"))
    adapted.base_model.model.set_attn_implementation("eager")  # PyTorch counts no fused attention of CPUs.
    ids = torch.zeros((2, 32), dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert model.work("tiny", method, 2, 32) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_lowest_of_layers_drawn_uniformly() -> None:
    draws = torch.rand(20000, 40, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :10]
    assert model.lowest_layer("13b", "sampled") == pytest.approx(
        draws.min(dim=1).values.double().mean().item(), rel=0.05
    )


def test_bytes_received_by_ring_algorithms() -> None:
    counted = model.Traffic(gathered=100, reduced=10)
    assert model.received_bytes(counted, "fsdp2", 4) == pytest.approx(0.75 * 110)
    assert model.received_bytes(model.Traffic(0, 10), "ddp", 4) == pytest.approx(0.75 * 20)
    assert model.received_bytes(model.traffic("13b", "lora", "none", 1), "none", 1) == 0


def test_between_nodes_hybrid_sharding_sends_gradients_alone() -> None:
    counted = model.Traffic(gathered=8e9, reduced=8e6)
    assert model.across_nodes(counted, 1, 8, 1e9, 1e9) == model.across_replicas(counted, 1, 8, 1e9, 1e9)
    for nodes in (2, 4):
        far = model.across_nodes(counted, nodes, 8, 1e12, 1e8), model.across_replicas(counted, nodes, 8, 1e12, 1e8)
        assert far[0] > 100 * far[1]


def test_the_model_is_fitted_to_steps_on_several_gpus_where_there_are_some() -> None:
    machine = model.Machine(3e10, 2e7, 0.01)  # Slow, as the model is tiny.

    def measured(processes: int, engine: str, method: str, rows: int) -> scaling.Row:
        flops = model.work("tiny", method, rows, 512)
        received = model.received_bytes(model.traffic("tiny", method, engine, processes), engine, processes)
        seconds = model.predict(machine, flops, received)[1]
        cell = {"size": "tiny", "processes": processes, "engine": engine, "method": method, "rows": rows, "tokens": 512}
        counted = [vars(model.traffic("tiny", method, engine, processes))]
        return scaling.Row({"cell": cell, "step_seconds": [seconds], "step_collectives": counted})

    rows = [
        measured(n, e, m, r)
        for n, e in ((1, "none"), (2, "ddp"), (2, "fsdp2"), (4, "fsdp2"))
        for m in ("lora", "sampled", "focused")
        for r in (1, 2)
    ]
    found, origin = paper_tables.machines_of(rows)
    for own in found.values():
        assert own.flops == pytest.approx(machine.flops, rel=0.01)
        assert own.bandwidth == pytest.approx(machine.bandwidth, rel=0.01)
    assert origin == "fitted to 24 steps"
    assumed, origin = paper_tables.machines_of([])
    assert {own.bandwidth for own in assumed.values()} == {paper_tables.Links.inside}
    assert assumed["sampled"].flops != assumed["lora"].flops
    assert "no step on several GPUs was measured" in origin
