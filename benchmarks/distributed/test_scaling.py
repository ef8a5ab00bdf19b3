"""Cells, their processes, and the tables of scaling."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

PATH = [*sys.path]
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import estimate  # noqa: E402
import measuring  # noqa: E402
import model  # noqa: E402
import scaling  # noqa: E402
import scaling_figure  # noqa: E402
from grid import Cell, plan  # noqa: E402
from workers import CellError, launch  # noqa: E402

sys.path[:] = PATH  # as other tests expect it


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


# --- tables and figure


def test_the_grid_names_what_was_not_run_and_what_failed() -> None:
    rows = [
        scaling.Row(row(1, "none", 0.2)),
        scaling.Row(row(2, "fsdp2", 0.25)),
        scaling.Row({**row(4, "fsdp2"), "error": "rank 2: out of memory"}),
    ]
    line = next(text for text in scaling.grid_table(rows).splitlines() if text.startswith("| 13b | FSDP2 | LoRA |"))
    assert line == "| 13b | FSDP2 | LoRA | 5120 (4655 to 5689) | 4096 (3724 to 4551) | out of memory | not run |"
    note = scaling.grid_table(rows).splitlines()[-1]
    assert "by the median of 3 steps" in note
    assert "| 70b | DDP, FSDP2 | all | not run | not run | not run | not run |" in scaling.grid_table(rows)


def test_without_a_run_there_is_one_line_in_the_place_of_the_grid() -> None:
    assert scaling.grid_table([]) == f"Not measured yet: `{scaling.COMMAND}`."


def test_tables_of_scaling_are_of_one_kind_of_gpu() -> None:
    rows = [scaling.Row(row(device=device)) for device in ("CPU", "CPU", "NVIDIA H100", "NVIDIA H200", "NVIDIA H200")]
    assert {own.line["device"] for own in scaling.rows_of_one_gpu(rows)} == {"NVIDIA H200"}
    assert scaling.rows_of_one_gpu(rows[:2]) == []


def test_the_source_of_a_table_has_every_commit_once() -> None:
    rows = [scaling.Row(row(commit=commit)) for commit in ("abc", "def", "abc")]
    assert scaling.sources(rows) == "NVIDIA H200, commit abc, def (torch 2)."


def test_a_step_has_its_share_of_a_measurement() -> None:
    shown = scaling.Row(row(2, "fsdp2", 0.2, method="sampled"))
    assert shown.whole_step == pytest.approx(0.2 + 0.06)
    assert shown.tokens_per_second == pytest.approx(1024 / 0.26)
    assert shown.spread == pytest.approx((0.18, 0.22))
    assert "| 600 ms | 23%, every 10 steps | 6.00 GB | 2 of 2 |" in scaling.probe_table([shown])
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
        "| 13b | 2 | DDP | LoRA | 2 × 512 | 3 | 200.0 ms (180.0 to 220.0) | 200.0 ms | – | 351.27 MB "
        "| 3.00 GB to 4.00 GB | 5120 |"
    )
    assert second == "| 13b | 2 | FSDP2 | LoRA | 2 × 512 | not done after 300 s | – | – | – | – | – | – |"


def test_the_figure_has_a_curve_for_each_backend_and_method(tmp_path: Path) -> None:
    rows = [
        scaling.Row(row(n, "fsdp2" if n > 1 else "none", s, rows=r))
        for n, s, r in ((1, 0.2, 2), (2, 0.25, 2), (4, 0.3, 2), (1, 0.8, 8), (2, 0.45, 4), (8, 0.2, 1))
    ]
    assert [own.cell.processes for own in scaling_figure.weak_rows(rows)] == [1, 2, 4]
    assert [own.cell.processes for own in scaling_figure.strong_rows(rows)] == [4, 1, 2, 8]
    scaling_figure.draw(tmp_path / "x.png", rows)
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_slow_step_moves_the_range_and_not_the_figure_of_a_cell() -> None:
    line = {**row(), "step_seconds": [0.2, 0.2, 2.0]}
    assert scaling.Row(line).tokens_per_second == pytest.approx(5120)
    assert scaling.Row(line).speeds == pytest.approx((512, 5120))


def test_labels_of_curves_are_apart_and_in_the_order_of_their_values() -> None:
    assert scaling_figure.apart([100, 300, 90, 95], 20) == [100, 300, 60, 80]


def test_the_figure_has_a_panel_of_strong_scaling_where_there_is_some(tmp_path: Path) -> None:
    weak = [scaling.Row(row(1)), scaling.Row(row(2, "ddp"))]
    strong = [*weak, scaling.Row(row(2, "ddp", rows=1))]
    for name, rows in (("weak.png", weak), ("strong.png", strong)):
        scaling_figure.draw(tmp_path / name, rows)
    widths = [int.from_bytes((tmp_path / name).read_bytes()[16:20], "big") for name in ("weak.png", "strong.png")]
    assert widths == [1125, 1650]


def test_a_cell_takes_what_its_steps_do_on_paper_and_what_others_took_beside_theirs() -> None:
    schedule = {"interval": 5, "rounds": 1}
    short = plan(["13b"], [1, 2], ["ddp", "fsdp2"], ["lora", "sampled", "focused"], 2, 0, 512, 0.0)
    assert len(short) == 9
    alone, sampled, *_, sharded = short
    assert estimate.expected_seconds(alone, schedule, "cuda") == pytest.approx(
        estimate.START + 15 * (0.05 + model.work("13b", "lora", 2, 512) / 3e14)
    )
    base = {"schedule": schedule, "seconds": 60.0}
    rows = [{"cell": vars(alone), **base}, {"cell": vars(alone), **base, "error": "x", "seconds": 900}]
    assert estimate.expected_seconds(alone, schedule, "cuda", rows) == pytest.approx(60)
    assert 60 < estimate.expected_seconds(sampled, schedule, "cuda", rows) < 62, "with three measurements"
    assert 60 < estimate.expected_seconds(sharded, schedule, "cuda", rows) < 64, "what is gathered takes time"
    rows.append({"cell": vars(short[3]), **base, "seconds": 90.0})
    assert 88 < estimate.expected_seconds(sharded, schedule, "cuda", rows) < 94, "as others with as many processes"
    late = Cell(**{**vars(sampled), "late": 5.0})
    assert estimate.training_seconds(late, schedule, "cuda") - estimate.training_seconds(
        sampled, schedule, "cuda"
    ) == pytest.approx(15)


def test_each_cell_says_before_it_starts_how_long_it_will_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = plan(["tiny"], [1], ["ddp"], ["lora", "focused"], 1, 0, 8, 0.0)
    (tmp_path / "worker.py").write_text(
        "import json, pathlib, sys, time\ntime.sleep(0.3)\npathlib.Path(sys.argv[2]).write_text('{}')\n"
    )
    monkeypatch.setattr(measuring, "HERE", tmp_path)
    measuring.run_cells(cells, tmp_path / "rows.jsonl", {"interval": 1, "rounds": 1}, 60)
    title = "{} of 2: tiny, 1 × none, {}, 1 × 8 tokens a process: {}"
    total, *said = capsys.readouterr().out.splitlines()
    assert total == "2 cells to measure, about 40 s"
    rows = measuring.read_rows(tmp_path / "rows.jsonl")
    took = [row["seconds"] for row in rows]
    assert min(took) >= 0.3
    assert said == [
        title.format(1, "lora", "about 20 s"),
        title.format(1, "lora", f"measured, {took[0]:.0f} s"),
        title.format(2, "focused", f"about {took[0]:.0f} s"),
        title.format(2, "focused", f"measured, {took[1]:.0f} s"),
    ]
