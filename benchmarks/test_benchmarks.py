"""The benchmarks of cost: every program runs on a tiny model, and tables and the summary come from JSON alone."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ist.step.fused import choice, few, modules

BENCHMARKS = Path(__file__).parents[0]
GIB = 2**30


def load(path: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A program of the benchmarks as a module; what it does to the import path is undone."""
    monkeypatch.setattr(sys, "path", [str((BENCHMARKS / path).parent), str(BENCHMARKS), *sys.path])
    name = path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    monkeypatch.delitem(sys.modules, "run", raising=False)  # that of another folder
    spec.loader.exec_module(module)
    return module


def run(path: str, arguments: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> dict[str, Any]:
    """What a program writes; `changed` are values of its own to put in other ones' place."""
    program = load(path, monkeypatch)
    for name, value in changed.items():
        monkeypatch.setattr(program, name, value)
    monkeypatch.setattr(sys, "argv", [path, "dry", *arguments.split(), "--folder", str(folder)])
    program.main()
    result = json.loads((folder / "dry.json").read_text())
    assert result["finished"]
    assert {"commit", "device", "versions", "config", "date"} <= {*result}
    return result


# --- every program runs


def test_memory_is_measured_for_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = load("memory/run.py", monkeypatch)
    broken = {**program.METHODS, "Series + IST": program.Method("series", {"beta": 7})}
    arguments = "--models gpt2-tiny tiny --tokens 8 --steps 2 --attentions sdpa --full-last"
    rows = run("memory/run.py", arguments, tmp_path, monkeypatch, METHODS=broken)["rows"]
    assert len(rows) == 2 * len(program.METHODS)
    failed = {name for name, row in rows.items() if "error" in row}
    assert failed == {"gpt2-tiny | Series + IST | sdpa", "tiny | Series + IST | sdpa"}
    assert "beta=7" in rows["tiny | Series + IST | sdpa"]["error"]

    lora, ist, full = (rows[f"tiny | {name} | sdpa"] for name in ("LoRA", "LoRA + IST", "Full"))
    assert lora["trainable"] == ist["trainable"] == lora["steps"][0]["gradients"]
    assert ist["steps"][0]["gradients"] == lora["trainable"] // 4  # 2 of 8 layers
    assert ist["steps"][0]["moments"] == lora["steps"][0]["moments"]  # of all layers
    assert lora["weights"] > full["weights"] >= full["trainable"]
    assert [*rows][-1].startswith("tiny | Full")


def test_what_cannot_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    program = load("memory/run.py", monkeypatch)
    harness = load("harness.py", monkeypatch)
    model = harness.make_model("gpt2-tiny", "cpu")
    needed = program.full_bytes("gpt2-tiny")
    assert needed == 8 * sum(parameter.numel() for parameter in model.parameters())
    for card, reason in ((needed, None), (needed // 2, "does not fit: 0 GiB needed")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card=card: (card, card))
        found = program.hopeless("gpt2-tiny", program.METHODS["Full"], "cuda")
        assert found is None if reason is None else found.startswith(reason)
        assert program.hopeless("gpt2-tiny", program.METHODS["LoRA"], "cuda") is None


def test_waiting_for_others_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = load("memory/run.py", monkeypatch)
    (tmp_path / "first.json").write_text('{"finished": true}')
    program.wait_for(["first"], tmp_path, patience=60)
    program.wait_for(["first", "never"], tmp_path, patience=0.1)


def test_steps_are_timed_and_failures_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "--size tiny --rows 2 --tokens 8 --rounds 1 --warm-steps 1 --groups plain probes seven liger"
    result = run("step_time/run.py", arguments, tmp_path, monkeypatch)
    rows = result["rows"]
    timed = {name for name, row in rows.items() if row.get("step_ms")}
    assert {"floor", "LoRA", "IST", "IST, frozen layers recomputed", "LoRA, seven modules, no dropout"} <= timed
    assert rows["IST"]["probe_ms"][0] > rows["LoRA"]["probe_ms"][0] == 0.0
    if importlib.util.find_spec("liger_kernel") is None:
        assert "liger_kernel" in rows["IST, Liger"]["error"]

    table = load("step_time/table.py", monkeypatch)
    assert table.step_table(result).count("\n") > len(rows)
    assert table.partner(rows, rows["IST"], floor=True) == rows["floor"]


def test_a_case_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = load("step_time/cases.py", monkeypatch).Case
    cases = (case("bad", {"beta": 7}), case("LoRA"), case("floor", floor=True))
    arguments = "--size tiny --layers 2 --rows 1 --tokens 8 --rounds 1 --groups plain"
    rows = run("step_time/run.py", arguments, tmp_path, monkeypatch, GROUPS={"plain": cases})["rows"]
    assert "beta=7" in rows["bad"]["error"]
    assert len(rows["LoRA"]["step_ms"]) == len(rows["floor"]["step_ms"]) == 1


def test_what_is_kept_above_a_part_of_the_depth_is_spread_over_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    kept_layers = load("step_time/run.py", monkeypatch).kept_layers
    assert kept_layers(32, 1.0) is None
    assert kept_layers(8, 0.5) == [0, 2, 4, 6]
    assert kept_layers(8, 0.5, 0.25) == [2, 3, 5, 6]
    assert kept_layers(32, 0.75, 0.25) == [*range(8, 32)]


def test_few_rows_are_computed_in_each_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = few.few_rows_linear, few.MOST_ROWS, choice.in_kernels
    monkeypatch.setattr(modules, "few_rows_linear", lambda *args: seen.append(args) or original[0](*args))
    cases = load("step_time/cases.py", monkeypatch).few_rows("all", 1.0)
    number = {}
    for case in cases:
        seen.clear()
        arguments = "--size tiny --layers 2 --rows 1 --tokens 8 --rounds 1 --warm-steps 1 --groups plain"
        rows = run("step_time/run.py", arguments, tmp_path, monkeypatch, GROUPS={"plain": (case,)})["rows"]
        assert len(rows[case.name]["step_ms"]) == 1
        number[case.name] = len(seen)
    assert (few.MOST_ROWS, choice.in_kernels) == original[1:]
    modules_of_steps = 2 * 5 * (1 + 10)
    assert number == {
        "all, PEFT's step": 0,
        "all, function of few rows": modules_of_steps,
        "all, function": 0,
        "all, function without kernels": 0,
    }


def test_iterations_are_timed_lisa_among_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "--size tiny --layers 4 --shapes 1x8 2x8 --steps 2 3 --warm 1"
    result = run("step_time/iterations.py", arguments, tmp_path, monkeypatch)
    rows = result["rows"]
    assert not [row for row in rows.values() if "error" in row]
    assert len(rows) == 8
    assert rows["2x8 | LISA"]["steps"] == 3
    assert all(row["seconds"] * 1e3 > row["steps"] * row["forward_ms"] > 0 for row in rows.values())
    assert "1 × 8: LISA" in load("step_time/table.py", monkeypatch).iteration_table(result)


def test_growth_and_the_librarys_own_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "--size tiny --tokens 4 8 --layers 2 4 --rows 1 --middle 8 2 1 --steps 2 --own-layers 4 --own-steps 20"
    result = run("step_time/growth.py", arguments, tmp_path, monkeypatch)
    assert [(row["layers"], row["tokens"], row["rows"]) for row in result["rows"]] == [(2, 4, 1), (2, 8, 1), (4, 8, 1)]
    assert all(row[name]["step_ms"] > 0 for row in result["rows"] for name in ("LoRA", "IST"))
    work = result["own_work"]
    assert work["layers"] == 4
    assert 0 < work["begin_step_ms"] < work["step_ms"] < work["update_ms"]
    tables = "\n".join(load("step_time/table.py", monkeypatch).growth_tables(result))
    assert "tokens (2 layers, 1 row)" in tables


def test_probe_batches_on_a_tiny_model(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = f"--model {tiny_model_folder} --train-steps 2 --train-rows 2 --sets 4 --rows 8 --sizes 1 2"
    arguments += " --updates 2 --repeats 3"
    result = run("probes/run.py", arguments, tmp_path, monkeypatch)
    assert [*result["rows"]] == ["1", "2", "4"]
    assert len(result["reference"]["effects"]) == 4
    assert "learned in 2 updates" in load("probes/table.py", monkeypatch).probe_table(result)


def test_the_focus_probe_on_a_tiny_model(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = f"--model {tiny_model_folder} --batches 2 --rows 2 --seeds 3"
    result = run("probes/focus.py", arguments, tmp_path, monkeypatch)
    found = result["rows"]
    assert len(found["scores"]) == len(found["seconds"]) == len(found["correlations"]) == 3
    assert 0 < found["probe_bytes"] < found["training_bytes"]
    table = load("probes/table.py", monkeypatch).focus_table([result])
    assert "word problems | 2 of 2 |" in table
    monkeypatch.setattr(sys, "argv", ["probes/focus.py", "dry", "--seeds", "1"])
    with pytest.raises(SystemExit):
        load("probes/focus.py", monkeypatch).main()


# --- what the figures mean


def test_spearman_and_the_bytes_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    program = load("probes/focus.py", monkeypatch)
    assert program.spearman([1, 20, 3, 4], [0.1, 0.4, 0.2, 0.3]) == pytest.approx(1.0)
    assert program.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)

    def run() -> int:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        second, third = torch.empty(1 << 21, dtype=torch.uint8), torch.empty(1 << 20, dtype=torch.uint8)
        return len(second) + len(third)

    peak, returned = program.peak_bytes("cpu", run)
    assert returned == 3 << 20
    assert peak == pytest.approx(3 << 20, rel=0.01)


@pytest.mark.parametrize(
    ("second", "tau"),
    [([1, 2, 3, 4], 1.0), ([4, 3, 2, 1], -1.0), ([2, 1, 3, 4], 2 / 3), ([5, 5, 5, 5], 0.0)],
)
def test_kendall_tau(second: list[int], tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    program = load("probes/run.py", monkeypatch)
    first = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert program.kendall_tau(first, torch.tensor(second).float()) == pytest.approx(tau)


def test_larger_probe_batches_rank_better(monkeypatch: pytest.MonkeyPatch) -> None:
    program = load("probes/run.py", monkeypatch)
    generator = torch.Generator().manual_seed(0)
    members = torch.stack([torch.randperm(12, generator=generator) < 6 for _ in range(40)])
    effects = torch.linspace(0, 0.11, 12, dtype=torch.float64)
    losses = 1 - members.double() @ effects
    noise = torch.randn(40, 64, generator=generator, dtype=torch.float64)
    rows = program.compare(losses[:, None] + noise * 0.2, torch.ones(64).double(), members, 32, (1, 16), (5,), 20)
    assert rows["16"]["sets"]["tau"] > rows["1"]["sets"]["tau"] + 0.1
    assert rows["16"]["layers"]["tau"] > rows["1"]["layers"]["tau"] + 0.1
    assert program.kendall_tau(program.layer_effects(losses, members), effects) > 0.6


def memory_row(**changes: Any) -> dict[str, Any]:
    step = {"activations": 4 * GIB, "gradients": GIB, "moments": 2 * GIB, "peak": 20 * GIB}
    low = {**step, "peak": 15 * GIB, "activations": 0}
    return {"weights": 12 * GIB, "probe_peak": 14 * GIB, "steps": [low, {**step, **changes}, low]}


def test_memory_is_split_at_the_highest_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    table = load("memory/table.py", monkeypatch)
    parts = table.split(memory_row())
    assert parts == {"total": 20, "weights": 12, "activations": 4, "gradients": 1, "moments": 2, "other": 1}
    assert table.split({**memory_row(), "probe_peak": 22 * GIB})["total"] == 22


def memory_result(**rows: Any) -> dict[str, Any]:
    named = {
        "7b | LoRA | eager": memory_row(),
        "7b | LoRA + IST | eager": memory_row(peak=16 * GIB),
        "7b | Full | eager": memory_row(peak=17 * GIB),
        "13b | Full | eager": {"error": "does not fit: 97 GiB needed for weights, gradients and moments alone"},
    }
    return {**header("memory"), "rows": {**named, **rows}}


def header(kind: str, date: str = "2026-01-01", **config: Any) -> dict[str, Any]:
    return {
        "name": f"{kind}-{date}",
        "kind": kind,
        "date": date,
        "commit": "abc",
        "device": "GPU",
        "versions": {"torch": "2"},
        "config": config,
    }


def test_memory_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    table = load("memory/table.py", monkeypatch)
    rows = table.merge([memory_result()])
    shown = table.totals_table(rows, "eager").splitlines()
    assert shown[0] == "| eager attention, GiB | LLaMA 7B | LLaMA 13B |"
    assert "| full | 17.0 (60) | does not fit (out of memory) |" in shown
    assert "| LoRA | 20.0 (24) | – (42) |" in shown
    assert "| LoRA + IST | 16.0 | – |" in shown
    assert shown[-1] == "| saved of LoRA's beyond the weights: LoRA + IST | 50% | – |"
    assert "| full | eager | 17.00 | 12.00 | 4.00 | 1.00 | 2.00 | -2.00 |" in table.split_table(rows, "7b")


def test_the_figure_stacks_to_the_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = load("cost_figure.py", monkeypatch)
    rows = figure.memory.merge([memory_result()])
    for row in rows.values():
        if "error" not in row:
            parts = figure.memory.split(row)
            assert sum(figure.stacked(parts).values()) == pytest.approx(parts["total"])
    figure.draw(tmp_path / "cost.png", rows, step_result({"LoRA": 400.0, "IST": 250.0}), "7b")
    assert (tmp_path / "cost.png").stat().st_size > 10_000


def step_result(times: dict[str, float], shape: tuple[int, int] = (16, 256), **changes: Any) -> dict[str, Any]:
    """A run of cases whose activations are a hundredth of their milliseconds."""
    case: dict[str, Any] = {"modules": ["q_proj"], "dropout": 0.05, "precision": "float32"}
    rows = {}
    for name, ms in times.items():
        options = {} if name.startswith("IST") else None
        kinds = {"liger": "Liger" in name, "compiled": "compiled" in name, "floor": name.startswith("floor")}
        seven = {"modules": ["all"], "dropout": 0.0} if "seven" in name else {}
        rows[name] = {
            "case": {"name": name, "options": options, **case, **kinds, **seven},
            "step_ms": [ms, 9 * ms, ms * 0.5],
            "probe_ms": [0.05 * ms] * 3 if options is not None else [0.0] * 3,
            "activation_gib": [ms / 100] * 3,
            "peak_gib": [ms / 50] * 3,
            "error": None,
        }
    config = {"size": "7b", "rows": shape[0], "tokens": shape[1], "rounds": 3, "probe_rows": 1, "layers": None}
    return {**header("step_time", **config), "rows": rows, **changes}


def test_a_run_compares_with_its_own_lora_and_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    table = load("step_time/table.py", monkeypatch)
    seven = {"LoRA, seven modules": 500.0, "IST, Liger, seven modules": 225.0}
    times = {"LoRA": 400.0, "floor": 200.0, "floor, Liger": 160.0, "IST": 220.0, "IST, Liger": 180.0, **seven}
    shown = table.step_table(step_result(times)).splitlines()
    assert "| IST | 220.0 | 0.55 | 1.10 | 5.0% | 2.20 | 0.55 | 4.4 |" in shown
    assert "| IST, Liger | 180.0 | 0.45 | 1.12 | 5.0% | 1.80 | 0.45 | 3.6 |" in shown
    assert "| IST, Liger, seven modules | 225.0 | 0.45 | 1.41 | 5.0% | 2.25 | 0.45 | 4.5 |" in shown


def test_the_summary_says_what_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = load("summary.py", monkeypatch)
    names = [target.name for target in summary.TARGETS]
    assert len({*names}) == len(names)
    old = step_result({"LoRA": 400.0, "IST": 390.0})
    new = step_result({"LoRA": 400.0, "IST": 220.0, "floor": 170.0}, date="2026-02-02", name="new", commit="def")
    tiny = step_result({"LoRA": 400.0, "IST": 1.0}, date="2026-03-03")
    tiny["config"]["size"] = "tiny"
    work = {
        **header("growth", "2026-04-04"),
        "device": "CPU (x)",
        "own_work": {"layers": 80, "step_ms": 0.4},
        "rows": [],
    }
    found = {target.name: summary.find(target, [old, new, tiny, work]) for target in summary.TARGETS}
    cells = found["step time, 16 × 256, IST, to LoRA"].cells()
    assert cells[1:] == ("0.55", "≤ 0.67", "met", "new.json", "def")
    assert found["activations, 16 × 256, IST, to LoRA"].verdict == "not met"
    assert found["step time, 16 × 256, IST, to the frozen base"].figure == pytest.approx(220 / 170)
    assert found["step time, 16 × 256, IST, to the frozen base"].verdict == "not met"
    assert found["importance loop's share, 16 × 256, IST"].cells()[1:4] == ("5.0%", "≤ 6.0%", "met")
    assert found["step time, 1 × 1024, IST, to LoRA"].verdict == "not measured"
    assert found["the library's own work a step, 80 layers, ms, on a CPU"].verdict == "met"
    assert len([*summary.lines([*found.values()])]) == len(names)


def test_a_section_is_filled_and_a_page_without_it_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = load("pages.py", monkeypatch)
    page = tmp_path / "page.md"
    begin, end = "<!-- x: made by `make tables` from JSON files -->", "<!-- end of x -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for tables, text in ((["| a |", "| b |"], "| a |\n\n| b |"), ([], "Not measured yet.")):
        pages.write_section("x", tables, page)
        assert page.read_text() == f"before\n{begin}\n\n{text}\n\n{end}\nafter\n"
    with pytest.raises(ValueError, match="lacks the line"):
        pages.write_section("y", [], page)


def test_docs_hold_what_the_json_files_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make tables` has been run since the last measurement."""
    pages = load("pages.py", monkeypatch)
    table = load("step_time/table.py", monkeypatch)
    memory = load("memory/table.py", monkeypatch)
    probes = load("probes/table.py", monkeypatch)
    summary = load("summary.py", monkeypatch)
    results = pages.load_results(table.RESULTS)
    steps = [result for result in results if result["kind"] == "step_time"]
    sampled = [result for result in steps if "IST" in result["rows"]]
    tables = [table.step_table(result) for result in steps]
    tables += [table.iteration_table(result) for result in results if result["kind"] == "iterations"]
    assert all(text in table.PAGE.read_text(encoding="utf-8") for text in tables)
    probed = pages.load_results(probes.HERE / "results")
    measured = [probes.probe_table(r) for r in probed if "reference" in r]
    measured.append(probes.focus_table([r for r in probed if r.get("kind") == "focus-probe"]))
    assert all(text in (probes.HERE / "README.md").read_text(encoding="utf-8") for text in measured)
    rows = memory.merge(pages.load_results(memory.HERE / "results"))
    totals = [memory.totals_table(rows, attention) for attention in ("eager", "sdpa")]
    assert all(text in (memory.HERE / "README.md").read_text(encoding="utf-8") for text in totals)
    page = pages.COST_PAGE.read_text(encoding="utf-8")
    findings = [summary.find(target, pages.load_results(summary.RESULTS)) for target in summary.TARGETS]
    assert all(text in page for text in [totals[1], summary.missed(findings), *map(table.cost_table, sampled)])
    norms = [result for result in steps if any(name.endswith(table.AGAIN) for name in result["rows"])]
    focused = [
        result for result in steps if result not in norms and any(name.startswith("focused") for name in result["rows"])
    ]
    busy = [table.busy_table(r, table.FOCUSED_LIST) for r in results if r["kind"] == "busy"]
    others = [table.norms_table(result, table.FOCUSED_LIST) for result in norms]
    assert all((focused, busy, others))
    assert all(text in page for text in [*map(table.focused_table, focused), *busy, *others])
    short = [table.short_table(result) for result in sampled if result["config"]["rows"] == 16]
    assert short[-1] in table.README.read_text(encoding="utf-8")
