"""Memory and time on paper: equal to what PyTorch counts, what a GPU held, and what synthetic steps were made of."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

PATH = [*sys.path]
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import bytes_on_paper  # noqa: E402
import fitted  # noqa: E402
import model  # noqa: E402
import paper_tables  # noqa: E402
import scaling  # noqa: E402
from build import even_focus, lora_config, materialise, weightless  # noqa: E402

import ist  # noqa: E402
from harness import model_config  # noqa: E402

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
    under_ddp = bytes_on_paper.state_bytes("tiny", method, "ddp", 2)
    assert under_ddp == [{**whole, "gradients": whole["adapters"]}] * 2, "DDP has zeros for frozen layers"


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


@pytest.mark.parametrize("layers", [8, 40])
def test_focus_on_random_weights_is_what_the_library_returns(layers: int) -> None:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model_config("tiny", layers))
    found = ist.focus(base, lora_config(), spread="even").to_dict()
    written = even_focus(lora_config(), layers).to_dict()
    for config in (found, written):
        config["target_modules"] = sorted(config["target_modules"])
    assert written == found


# --- the model


@pytest.mark.parametrize("bandwidth", [1e11, INFINITE])
@pytest.mark.parametrize("overhead", [0.0, 0.02])
@pytest.mark.parametrize("collective", [0.0, 1e-3])
def test_the_fit_finds_the_machine_that_made_the_steps(bandwidth: float, overhead: float, collective: float) -> None:
    sizes = [(1e13, 0.0, 0), (2e13, 0.0, 0), (2e13, 5e9, 100), (4e13, 5e9, 200), (4e13, 4e10, 100)]
    machines = {
        name: model.Machine(rate, bandwidth, overhead, collective) for name, rate in (("lora", 4e14), ("sampled", 2e14))
    }
    steps = {
        name: [model.Work(*step, model.predict(machine, *step)) for step in sizes] for name, machine in machines.items()
    }
    found = model.fit({**steps, "focused": []})
    assert {*found} == {*machines}
    for name, machine in machines.items():
        assert found[name].flops == pytest.approx(machine.flops)
        assert found[name].bandwidth == pytest.approx(machine.bandwidth)
        assert found[name].overhead == pytest.approx(machine.overhead, abs=1e-9)
        assert found[name].collective == pytest.approx(machine.collective, abs=1e-9)


def test_all_methods_share_a_bandwidth_and_no_overhead_is_guessed_from_one_shape() -> None:
    """As many bytes cost 0.2 s in one method and 0.4 s in the other: no method has a bandwidth of its own."""
    steps = {
        name: [model.Work(flops, 0.0, 0, 0.2), model.Work(flops, 2e10, 0, 0.2 + more)]
        for name, flops, more in (("lora", 5e13, 0.2), ("sampled", 4e13, 0.4))
    }
    lora, sampled = model.fit(steps).values()
    assert lora.bandwidth == sampled.bandwidth
    assert 2e10 / 0.4 < lora.bandwidth < 2e10 / 0.2
    assert lora.overhead == sampled.overhead == 0.0


def test_one_step_gives_a_rate_and_none_is_an_error() -> None:
    (machine,) = model.fit({"lora": [model.Work(1e12, 0.0, 0, 0.5)]}).values()
    assert machine.flops == pytest.approx(2e12)
    assert (machine.bandwidth, machine.overhead) == (INFINITE, 0.0)
    with pytest.raises(ValueError, match="no measured step"):
        model.fit({"lora": []})


def test_a_step_is_its_computation_and_its_communication() -> None:
    assert model.predict(model.Machine(1e12, INFINITE), 2e12, 1e15) == 2.0
    assert model.predict(model.Machine(INFINITE, 1e9, 0.5), 2e12, 3e9) == 3.5
    assert model.predict(model.Machine(1e12, 1e9), 2e12, 3e9, 100) == 5.0
    assert model.predict(model.Machine(1e12, INFINITE, 0.0, 0.01), 2e12, 3e9, 100) == 3.0


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


MACHINE = model.Machine(3e10, 2e7, 0.01, 0.002)
"""Slow, as the model is tiny."""


def made(processes: int, engine: str, method: str, rows: int, factor: float = 1.0) -> scaling.Row:
    """A row whose step is the model's, or so many times that."""
    flops = model.work("tiny", method, rows, 512)
    counted = model.traffic("tiny", method, engine, processes)
    calls = {"none": 0, "ddp": 1, "fsdp2": model.num_collectives("tiny", method)}[engine]
    seconds = factor * model.predict(MACHINE, flops, model.received_bytes(counted, engine, processes), calls)
    cell = {"size": "tiny", "processes": processes, "engine": engine, "method": method, "rows": rows, "tokens": 512}
    return scaling.Row(
        {"cell": cell, "step_seconds": [seconds], "step_collectives": [{**vars(counted), "calls": calls}]}
    )


def made_rows(factor: float = 1.0) -> list[scaling.Row]:
    """A plan's rows; the last one's step is so many times what the model says."""
    rows = [
        made(processes, engine, method, rows)
        for processes, engine in ((1, "none"), (2, "ddp"), (2, "fsdp2"), (4, "fsdp2"))
        for method in ("lora", "sampled", "focused")
        for rows in (1, 2)
    ]
    return [*rows[:-1], made(4, "fsdp2", "focused", 2, factor)]


def test_the_model_is_fitted_to_steps_on_several_gpus() -> None:
    rows = made_rows()
    for machine in fitted.machines_of(rows).values():
        assert machine.flops == pytest.approx(MACHINE.flops)
        assert machine.bandwidth == pytest.approx(MACHINE.bandwidth)
        assert machine.overhead == pytest.approx(MACHINE.overhead)
        assert machine.collective == pytest.approx(MACHINE.collective)
    assert fitted.worst_errors(rows) == pytest.approx((1, 1))
    table = fitted.fit_table(rows)
    assert "6 numbers, fitted to 24 rows" in table
    assert "2.00 ms for a collective" in table
    assert "this shape" not in table
    assert "differs from the measured steps by up to 0%" in table


def test_a_row_is_predicted_from_the_others_and_predictions_are_as_wide_as_that_was_wrong() -> None:
    rows = made_rows(factor=2.0)
    assert fitted.left_out(rows)[-1] == pytest.approx(rows[-1].step / 2)
    least, most = fitted.worst_errors(rows)
    assert most == pytest.approx(2)
    assert least < 1
    table = paper_tables.beyond_table(rows)
    assert f"from {least:.2f} times the fastest method's step to 2.00 times the slowest's" in table
    assert "(−50%)" in fitted.fit_table(rows).splitlines()[-3]


def test_predictions_are_as_wide_as_another_shape_was_wrong() -> None:
    """The other shape's step is three times what this one's rows predict."""
    rows = made_rows()
    other = made(4, "fsdp2", "lora", 2, factor=3.0)
    other = scaling.Row({**other.line, "cell": {**other.line["cell"], "size": "other"}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitted, "work", lambda size, *others: model.work("tiny", *others))
        alone = fitted.without_its_shape([*rows, other])
        assert alone[-1] == pytest.approx(other.step / 3)
        assert alone[:-1] == [None] * len(rows), "one step shows no cost of communication"
        assert fitted.worst_errors([*rows, other])[1] == pytest.approx(3)
        assert "model without this shape" in fitted.fit_table([*rows, other])


def test_without_a_step_on_several_gpus_there_is_no_model() -> None:
    alone = [row for row in made_rows() if row.cell.processes == 1]
    for rows in ([], alone):
        assert fitted.machines_of(rows) == {}
        assert fitted.fit_table(rows) == paper_tables.beyond_table(rows) == ""


# --- the cells that were measured


def test_measured_cells_keep_and_send_what_is_on_paper() -> None:
    rows = [row for row in scaling.load_rows(HERE / "results") if row.error is None]
    assert any(row.on_gpu for row in rows)
    for row in rows:
        cell = row.cell
        assert row.agreed, cell.name
        assert len(row.line["step_seconds"]) == row.line["schedule"]["interval"] * row.line["schedule"]["rounds"]
        paper = bytes_on_paper.state_bytes(cell.size, cell.method, cell.engine, cell.processes)
        sent = model.traffic(cell.size, cell.method, cell.engine, cell.processes)
        collectives = model.num_collectives(cell.size, cell.method)
        assert row.counted.reduced == sent.reduced, cell.name
        if cell.method == "sampled":
            # Other layers at each step than on average, and layers get optimizer state when they are first active.
            assert row.counted.gathered == pytest.approx(sent.gathered, rel=0.1), cell.name
            layers = bytes_on_paper.num_layers(cell.size)
            assert cell.engine != "fsdp2" or abs(row.collectives - collectives) < 0.1 * layers, cell.name
            paper = [{**own, "optimizer": row.line["state_bytes"][0]["optimizer"]} for own in paper]
        else:
            assert row.counted.gathered == sent.gathered, cell.name
            assert cell.engine != "fsdp2" or row.collectives == collectives, cell.name
        assert row.line["state_bytes"] == paper, cell.name


def test_peaks_on_paper_are_those_of_the_gpus_that_ran_peft_and_no_less_than_those_of_the_fused_step() -> None:
    rows = [row for row in scaling.load_rows(HERE / "results") if row.on_gpu and row.error is None]
    for row in rows:
        cell = row.cell
        place = (cell.size, cell.method, cell.engine, cell.processes)
        paper = paper_tables.peak_on_paper(*place, cell.rows, cell.tokens)
        peak = max(row.line["peak_bytes"])
        if cell.method == "lora":
            # Operations need more for a moment, in larger batches above all.
            assert peak == pytest.approx(paper, rel=0.02 if (cell.size, cell.rows) == ("13b", 2) else 0.05), cell.name
        else:
            assert 0.7 * paper < peak < paper, cell.name


# --- the page


def test_what_the_page_says_of_the_model_is_what_it_does() -> None:
    page = " ".join((HERE.parents[1] / "docs" / "from-one-card-to-a-node.md").read_text(encoding="utf-8").split())
    rows = fitted.fitted_rows(scaling.rows_of_one_gpu(scaling.load_rows(HERE / "results")))
    large = [row for row in rows if row.cell.size == "70b"]
    lines = (HERE / "results" / "node.jsonl").read_text(encoding="utf-8").splitlines()
    first = [scaling.Row({**line, "step_collectives": without_calls(line)}) for line in map(json.loads, lines)]
    assert len(first) == 9
    machines = fitted.machines_of(first)
    assert {machine.collective for machine in machines.values()} == {0.0}
    predicted: list[float] = [fitted.seconds_of(machines, row) for row in large]  # type: ignore[misc]
    assert f"predicted {min(predicted):.1f} to {max(predicted):.1f} s for the three steps of 70B" in page
    assert all(seconds > 2 * row.step for seconds, row in zip(predicted, large, strict=True)), "more than twice"
    missed: list[float] = fitted.left_out(first)  # type: ignore[assignment]
    worst = max(abs(seconds / row.step - 1) for seconds, row in zip(missed, first, strict=True))
    assert f"missed those by up to {worst:.0%} when each was left out" in page
    bandwidth = fitted.machines_of(rows)["lora"].bandwidth
    assert bandwidth == pytest.approx(2 * 450e9, rel=0.05), "about twice what the links carry"
    counted = model.Traffic(1.0, 0.0)
    more = model.received_bytes(counted, "fsdp2", 8) / model.received_bytes(counted, "fsdp2", 2)
    assert f"each receives {more:.2f} times the bytes" in page


def test_what_the_page_says_of_peaks_is_what_the_gpus_held() -> None:
    page = " ".join((HERE.parents[1] / "docs" / "from-one-card-to-a-node.md").read_text(encoding="utf-8").split())
    less: dict[tuple[str, bool], list[float]] = {}
    for row in fitted.fitted_rows([row for row in scaling.load_rows(HERE / "results") if row.on_gpu]):
        cell = row.cell
        if cell.rows == 2:
            paper = paper_tables.peak_on_paper(cell.size, cell.method, cell.engine, cell.processes, 2, cell.tokens)
            share = 1 - max(row.line["peak_bytes"]) / paper
            less.setdefault((cell.size, cell.method == "lora"), []).append(share)
    small, large = (max(map(abs, less[size, True])) for size in ("13b", "70b"))
    assert small < 0.02 < large < 0.03
    assert "LoRA's peak was within 2% of that at 13B and within 3% at 70B." in page
    assert f"held up to {max(*less['13b', False], *less['70b', False]):.0%} less than on paper" in page


def without_calls(line: dict[str, Any]) -> list[dict[str, int]]:
    """Steps for the model's first form, which had no time for a collective."""
    return [{**step, "calls": 0} for step in line["step_collectives"]]
