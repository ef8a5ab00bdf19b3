"""Cells, the model on paper, and the tables of scaling, without processes."""

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
import measuring  # noqa: E402
import model  # noqa: E402
import paper_tables  # noqa: E402
import scaling  # noqa: E402
import scaling_figure  # noqa: E402
from build import materialise, weightless  # noqa: E402
from grid import Cell, plan  # noqa: E402
from workers import CellError, launch  # noqa: E402

sys.path[:] = PATH  # as other tests expect it

INFINITE = float("inf")


def row(processes: int = 1, engine: str = "none", seconds: float = 0.2, **changed: Any) -> dict[str, Any]:
    """A line of results."""
    cell = {"size": "13b", "method": "lora", "rows": 2, "tokens": 512, "late": 0.0}
    cell = {**cell, "processes": processes, "engine": engine, **{k: changed[k] for k in changed if k in cell}}
    paper = model.traffic(cell["size"], cell["method"], engine, processes)
    figures = {
        "step_seconds": [seconds * 0.9, seconds, seconds * 1.1],
        "probe_seconds": [0.5, 0.7] if cell["method"] == "sampled" else [],
        "step_collectives": [{"gathered": paper.gathered, "reduced": paper.reduced, "calls": 1}],
        "probe_collectives": {"gathered": 6e9, "reduced": 0, "calls": 1},
        "peak_bytes": [3 * 10**9] * processes,
        "digests": ["a"] * processes,
        "device": "NVIDIA H200",
        "schedule": {"interval": 10, "rounds": 2},
        "commit": "abc",
        "versions": {"torch": "2"},
    }
    return {"cell": cell, **figures, **{k: changed[k] for k in changed if k not in cell}}


# --- cells


def test_a_plan_has_weak_and_strong_cells_each_once() -> None:
    cells = plan(["13b"], [4, 1, 2], ["ddp", "fsdp2"], ["lora"], 2, 4, 512)
    shown = [(cell.processes, cell.engine, cell.rows) for cell in cells]
    assert shown == [
        (1, "none", 2), (1, "none", 4),
        (2, "ddp", 2), (2, "fsdp2", 2),
        (4, "ddp", 2), (4, "ddp", 1), (4, "fsdp2", 2), (4, "fsdp2", 1),
    ]  # fmt: skip


def test_a_late_rank_is_a_cell_of_its_own_for_each_backend() -> None:
    cells = plan(["tiny"], [1, 2], ["ddp", "fsdp2"], ["lora", "sampled"], 2, 4, 16, late=3.0)
    assert [(cell.engine, cell.method) for cell in cells if cell.late] == [("ddp", "sampled"), ("fsdp2", "sampled")]


def test_cells_with_a_line_are_skipped_and_a_line_that_was_cut_off_is_not_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Cell] = []

    def measure(cell: Cell, schedule: Any, limit: float) -> dict[str, Any]:
        measured.append(cell)
        return {"device": "CPU"}

    monkeypatch.setattr(measuring, "measure", measure)
    first, second = plan(["tiny"], [1], [], ["lora", "focused"], 2, 2, 16)
    file = tmp_path / "results" / "x.jsonl"
    measuring.run_cells([first], file, {"interval": 1, "rounds": 1}, 1)
    with file.open("a") as out:
        out.write('{"cell": {"size": "ti')
    measuring.run_cells([first, second], file, {"interval": 1, "rounds": 1}, 1)
    assert measured == [first, second]
    rows = measuring.read_rows(file)
    assert [Cell(**line["cell"]) for line in rows] == [first, second]
    assert {"commit", "versions", "device", "date", "schedule"} <= {*rows[0]}


# --- processes


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, sys; sys.exit('of rank ' + os.environ['RANK'] if os.environ['RANK'] == '1' else 0)", "of rank 1"),
        ("import time; time.sleep(60)", "not done after 1 s (still running: rank 0, 1)"),
        ("import os; os.kill(os.getpid(), 9)", "exit status -9"),
    ],
    ids=["fails", "hangs", "dies"],
)
def test_a_cell_that_fails_or_hangs_says_why(code: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.GRACE", 0.1)
    with pytest.raises(CellError) as caught:
        launch(["-c", code], 2, limit=1)
    assert said in str(caught.value)


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


# --- tables and figure


def test_the_grid_names_what_was_not_run_and_what_failed() -> None:
    rows = [
        scaling.Row(row(1, "none", 0.2)),
        scaling.Row(row(2, "fsdp2", 0.25)),
        scaling.Row({**row(4, "fsdp2"), "error": "rank 2: out of memory"}),
    ]
    line = next(text for text in scaling.grid_table(rows).splitlines() if text.startswith("| 13b | FSDP2 | LoRA |"))
    assert line == "| 13b | FSDP2 | LoRA | 5120 | 4096 | out of memory | not run |"
    assert scaling.COMMAND in scaling.grid_table([])


def test_tables_of_scaling_are_of_one_kind_of_gpu() -> None:
    rows = [scaling.Row(row(device=device)) for device in ("CPU", "CPU", "NVIDIA H100", "NVIDIA H200", "NVIDIA H200")]
    assert {own.line["device"] for own in scaling.rows_of_one_gpu(rows)} == {"NVIDIA H200"}
    assert scaling.rows_of_one_gpu(rows[:2]) == []


def test_a_step_has_its_share_of_a_measurement() -> None:
    shown = scaling.Row(row(2, "fsdp2", 0.2, method="sampled"))
    assert shown.whole_step == pytest.approx(0.2 + 0.06)
    assert shown.tokens_per_second == pytest.approx(1024 / 0.26)
    assert shown.spread == pytest.approx((0.19, 0.21))
    assert "| 600 ms | 23% | 6.00 GB | 2 of 2 |" in scaling.probe_table([shown])
    assert "**no**" in scaling.probe_table([scaling.Row(row(2, "fsdp2", method="sampled", digests=["a", "b"]))])


def test_counted_bytes_stand_beside_those_on_paper() -> None:
    (line,) = scaling.traffic_table([scaling.Row(row(2, "ddp"))]).splitlines()[2:3]
    assert line == "| 13b | 2 | DDP | LoRA | – | – | 351.27 MB | 351.27 MB |"


def test_a_cell_has_its_step_its_bytes_and_the_memory_of_its_ranks_or_its_error() -> None:
    rows = [
        scaling.Row(row(2, "ddp", peak_bytes=[3 * 10**9, 4 * 10**9])),
        scaling.Row({**row(2, "fsdp2"), "error": "not done after 300 s"}),
    ]
    first, second = scaling.cell_table(rows).splitlines()[2:4]
    assert first == (
        "| 13b | 2 | DDP | LoRA | 2 × 512 | 200.0 ms (190.0 to 210.0) | 200.0 ms | – | 351.27 MB | 3.00 GB to 4.00 GB "
        "| 5120 |"
    )
    assert second == "| 13b | 2 | FSDP2 | LoRA | 2 × 512 | not done after 300 s | – | – | – | – | – |"


def test_the_figure_has_a_curve_for_each_backend_and_method(tmp_path: Path) -> None:
    rows = [
        scaling.Row(row(n, "fsdp2" if n > 1 else "none", s, rows=r))
        for n, s, r in ((1, 0.2, 2), (2, 0.25, 2), (4, 0.3, 2), (1, 0.8, 8), (2, 0.45, 4), (8, 0.2, 1))
    ]
    assert [own.cell.processes for own in scaling_figure.weak_rows(rows)] == [1, 2, 4]
    assert [own.cell.processes for own in scaling_figure.strong_rows(rows)] == [4, 1, 2, 8]
    scaling_figure.draw(tmp_path / "x.png", rows)
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_the_model_is_fitted_to_steps_on_several_gpus_where_there_are_some() -> None:
    machine = model.Machine(3e10, 2e7, 0.01)  # Slow, as the model is tiny.

    def measured(processes: int, engine: str, method: str, rows: int) -> scaling.Row:
        flops = model.work("tiny", method, rows, 512)
        received = model.received_bytes(model.traffic("tiny", method, engine, processes), engine, processes)
        seconds = model.predict(machine, flops, received)[1]
        return scaling.Row(row(processes, engine, seconds, size="tiny", method=method, rows=rows))

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
