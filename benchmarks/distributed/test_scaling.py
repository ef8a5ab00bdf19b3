"""Cells, their processes, and the tables of scaling."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

PATH = [*sys.path]
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
RUN = sys.modules.pop("run", None)  # benchmarks/step_time has one too

import estimate  # noqa: E402
import measuring  # noqa: E402
import model  # noqa: E402
import run  # noqa: E402
import scaling  # noqa: E402
import scaling_figure  # noqa: E402
import strong_scaling  # noqa: E402
import table  # noqa: E402
from grid import METHODS, Cell, plan  # noqa: E402
from workers import CellError, Workers, launch  # noqa: E402

sys.path[:] = PATH  # as other tests expect it
del sys.modules["run"]
if RUN is not None:
    sys.modules["run"] = RUN


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

    def row(self: Any, planned: measuring.Planned) -> dict[str, Any]:
        measured.append(planned[0])
        return {"device": "CPU"}

    monkeypatch.setattr(measuring.Ahead, "row", row)
    first, second = plan(["tiny"], [1], [], ["lora", "focused"], 2, 2, 16)
    file = tmp_path / "results" / "x.jsonl"
    schedule = {"interval": 1, "rounds": 1}
    measuring.run_cells([(first, schedule)], file, 1)
    with file.open("a") as out:
        out.write('{"cell": {"size": "ti')
    measuring.run_cells([(first, schedule), (second, schedule)], file, 1)
    assert measured == [first, second]
    rows = measuring.read_rows(file)
    assert [Cell(**line["cell"]) for line in rows] == [first, second]
    assert {"commit", "versions", "device", "date", "schedule"} <= {*rows[0]}


def test_groups_of_flags_follow_one_another_each_with_its_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(run, "run_cells", lambda *arguments: given.extend(arguments))
    flags = (
        "x --within 270 --sizes 70b --processes 2 --engines fsdp2 --methods lora --total-rows 0 --late 0 --interval 5"
    )
    late = "--then --sizes 13b --processes 1 2 --engines ddp --late 2 --only-late --rounds 1 --warm-up 3"
    again = "--then --sizes 70b --processes 2 --engines fsdp2 --methods lora --total-rows 0 --late 0"
    run.main(["--results", str(tmp_path), *f"{flags} {late} {again}".split()])
    planned, file, limit, within, ahead = given
    assert [(cell.size, cell.method, cell.late, own) for cell, own in planned] == [
        ("70b", "lora", 0.0, {"interval": 5, "rounds": 2, "warm_up": 1}),
        ("13b", "sampled", 2.0, {"interval": 10, "rounds": 1, "warm_up": 3}),
    ]
    assert (file, limit, within, ahead) == (tmp_path / "x.jsonl", 300, 270, False)


def test_a_cell_for_which_no_time_is_left_has_no_line_and_a_shorter_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring.Ahead, "row", lambda *_: {"device": "CPU"})
    monkeypatch.setattr(
        measuring, "expected_seconds", lambda cell, *_: {"lora": 10, "sampled": 100, "focused": 20}[cell.method]
    )
    cells = [(cell, {"interval": 1, "rounds": 1}) for cell in plan(["tiny"], [1], [], list(METHODS), 2, 0, 16)]
    measuring.run_cells(cells, tmp_path / "x.jsonl", 1, within=60)
    assert [line["cell"]["method"] for line in measuring.read_rows(tmp_path / "x.jsonl")] == ["lora", "focused"]
    assert "not run, about 100 s with 60 s left" in capsys.readouterr().out


# --- processes


WAITING = """
import json, os, pathlib, sys, time
cell = json.loads(sys.argv[1])["cell"]["method"]
folder = pathlib.Path(__file__).parent
(folder / f"{cell}-started").touch()
while not os.path.exists(os.environ["GO_FILE"]):
    time.sleep(0.01)
end = time.monotonic() + 20
while cell == "lora" and not (folder / "focused-started").exists() and time.monotonic() < end:
    time.sleep(0.01)
if cell == "lora":
    sys.exit("out of memory")
pathlib.Path(sys.argv[2]).write_text(json.dumps({"device": "CPU"}))
"""


def test_the_next_cell_starts_ahead_and_runs_after_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker.py").write_text(WAITING)
    monkeypatch.setattr(measuring, "HERE", tmp_path)
    monkeypatch.setattr("workers.GRACE", 0.1)
    schedule = {"interval": 1, "rounds": 1}
    first, second = [(cell, schedule) for cell in plan(["tiny"], [1], [], ["lora", "focused"], 2, 0, 16)]
    with measuring.Ahead([first, second], 60, ahead=True) as trials:
        assert trials.row(first)["error"] == "rank 0: out of memory"
        assert (tmp_path / "focused-started").exists(), "while the first ran, which waited for it"
        assert trials.row(second)["device"] == "CPU"
    with measuring.Ahead([first, second, first], 60, ahead=True) as trials:
        assert trials.row(second)["device"] == "CPU", "a cell that was not started ahead is started, and the next ended"


def test_processes_that_wait_end_with_their_program(tmp_path: Path) -> None:
    file = tmp_path / "started"
    code = f"import os, pathlib, sys, time; pathlib.Path({str(file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    with Workers(["-c", code], 1, limit=60):
        while not (file.exists() and file.read_text()):
            time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


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
    large = scaling.grid_table([scaling.Row(row(2, "fsdp2", size="70b"))])
    assert "| 70b | DDP | all | not run | not run | not run | not run |" in large
    assert "| 70b | FSDP2 | LoRA | not run | 5120 (4655 to 5689) | not run | not run |" in large


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
    assert widths == [630, 1260]


def test_a_cell_takes_what_its_steps_do_on_paper_and_what_others_took_beside_theirs() -> None:
    schedule = {"interval": 5, "rounds": 1}
    short = plan(["13b"], [1, 2], ["ddp", "fsdp2"], ["lora", "sampled", "focused"], 2, 0, 512, 0.0)
    assert len(short) == 9
    alone, sampled, *_, sharded = short
    assert estimate.expected_seconds(alone, schedule, "cuda") == pytest.approx(
        estimate.START + 11 * (0.05 + model.work("13b", "lora", 2, 512) / 3e14)
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
    measuring.run_cells([(cell, {"interval": 1, "rounds": 1}) for cell in cells], tmp_path / "rows.jsonl", 60)
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


# --- rows that a later run adds


def write(folder: Path, name: str, lines: list[dict[str, Any]]) -> None:
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_last_measurement_of_a_cell_counts_whatever_its_file_and_a_failure_replaces_none(tmp_path: Path) -> None:
    old, new, failed = ({**row(), "date": f"2026-11-{day}", "seconds": day} for day in (1, 2, 3))
    write(tmp_path, "a.jsonl", [new])
    write(tmp_path, "b.jsonl", [old, {**failed, "error": "rank 0: out of memory"}])
    (shown,) = scaling.load_rows(tmp_path)
    assert shown.line["seconds"] == 2


def later_rows() -> list[dict[str, Any]]:
    """What two GPUs can add to the nine cells: the largest shape, of which a cell has no memory, a late rank, and one
    batch on one GPU and on two.
    """
    large = [row(2, "fsdp2", 2.0 + number, size="70b", method=method) for number, method in enumerate(METHODS)]
    large[0] = {**{name: large[0][name] for name in ("cell", "commit", "versions")}, "error": "rank 1: out of memory"}
    large[0] |= {"device": "NVIDIA H200", "schedule": {"interval": 5, "rounds": 1, "warm_up": 2}}
    late = [row(2, engine, method="sampled", late=2.0) for engine in ("ddp", "fsdp2")]
    one = [row(1, "none", 0.4, method=method, rows=4) for method in METHODS]
    two = [row(2, "fsdp2", 0.3, method=method) for method in METHODS]
    weak = [row(1, "none", 0.2, method=method) for method in METHODS]
    return [{**line, "date": "2026-12-01"} for line in (*large, *late, *one, *two, *weak)]


def test_pages_take_the_rows_of_a_later_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "later.jsonl", later_rows())
    page, full = tmp_path / "page.md", tmp_path / "full.md"
    page.write_text(table.NODE_PAGE.read_text())
    full.write_text(table.FULL_PAGE.read_text())
    monkeypatch.setattr(table, "NODE_PAGE", page)
    monkeypatch.setattr(table, "FULL_PAGE", full)
    monkeypatch.setattr(table, "PICTURE", tmp_path / "scaling.png")
    table.write_node_page(tmp_path)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    text = page.read_text()
    assert "| 70b | FSDP2 | LoRA | not run | out of memory | not run | not run |" in text
    assert "| 70b | FSDP2 | sampled (IST) | not run | 335 (" in text
    assert "| 13b | 4 × 512 | FSDP2 | LoRA | 5120 (4655 to 5689) | 6827 (6206 to 7585), 1.33 × |" in text
    assert "| 13b | 2 | FSDP2 | by 2 s | 600 ms |" in text
    assert "| 70b | sampled (IST) | 161.0 | not run |" in text
    assert "| 70b | 2 | FSDP2 | LoRA | 2 × 512 | rank 1: out of memory |" in full.read_text()


def test_one_batch_on_several_gpus_and_nothing_where_there_is_none() -> None:
    rows = [scaling.Row(line) for line in later_rows()]
    lines = strong_scaling.strong_table(rows).splitlines()
    assert [line.split(" | ")[2:4] for line in lines[2:5]] == [
        ["FSDP2", "LoRA"], ["FSDP2", "sampled (IST)"], ["FSDP2", "focused (half)"]
    ]  # fmt: skip
    assert not lines[5], "DDP has no such row"
    assert strong_scaling.strong_table([own for own in rows if own.cell.processes == 2]) == ""


def test_the_figure_has_no_panel_without_a_point() -> None:
    large = [scaling.Row(row(2, "fsdp2", 2.0, size="70b"))]
    assert scaling_figure.panels_of(large) == [(large, False)], "a single number of GPUs is no strong scaling"
    rows = [scaling.Row(line) for line in later_rows() if "error" not in line and not line["cell"]["late"]]
    kinds = [(own[0].cell.size, together) for own, together in scaling_figure.panels_of(rows)]
    assert kinds == [("70b", False), ("13b", False), ("13b", True)]


def test_a_panel_has_the_numbers_of_gpus_that_were_measured() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    scaling_figure.draw_panel(axes, [scaling.Row(row(2, "fsdp2", 2.0, size="70b"))], together=False)
    assert axes.get_xticks().tolist() == [2]
    assert axes.get_title() == "70B, 2 × 512 tokens on each"
    assert [text.get_text() for text in axes.texts] == ["LoRA, FSDP2"]
    assert axes.get_ylim()[1] > 1024 / 1.8, "the fastest step's bar is in the panel"
