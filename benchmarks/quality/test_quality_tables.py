"""The tables of the benchmark of quality: best rates, paired differences, questions, and the page they make."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1]
PATH = [*sys.path]
sys.path.insert(0, str(BENCHMARKS))

from quality import figure, figures, layers, plan, questions, repeats, table, verdict  # noqa: E402

sys.path[:] = PATH  # as other tests expect it

PLANS = sorted((BENCHMARKS / "quality" / "plans").glob("*.yaml"))


def line_of(method: str, seed: int, loss: float, rate: float = 1e-3, **changed: Any) -> dict[str, Any]:
    test = {"exact answers": {"accuracy": 1 - loss, "correct": 1, "total": 4}, "answers": {"loss": loss}}
    return {
        "id": f"{method} {seed} {rate} {changed}", "kind": "training", "task": "mawps", "method": method, "seed": seed,
        "learning_rate": rate, "study": "main", "model": "small", "base_steps": 9, "steps": 9, "epochs": None,
        "budget": "steps", "ablation": False, "options": {"selector": method}, "test": test, "rows": {"left_out": 0},
        "setting": {"batch_size": 2, "rank": 2, "dropout": 0.0}, "curve": [[9, 1.0, loss]], "date": "2026",
        "device": "GPU", "commit": "abc", "versions": {"torch": "2"}, "file": "x.jsonl", **changed,
    }  # fmt: skip


def test_the_tables_hold_the_best_rate_and_paired_differences() -> None:
    lines = [line_of("LoRA", 0, 0.9, rate=1e-2), line_of("random", 0, 0.2, rate=1e-2)]  # one method's best, one not
    for seed, shift in enumerate((0.0, 0.02, 0.04)):
        lines += [line_of("LoRA", seed, 0.3 + shift), line_of("random", seed, 0.5 + shift)]
        lines.append(line_of("IST, mu 100", seed, 0.4 + shift * 1.1))
        lines.append(line_of("mu 1", seed, 0.6 + shift, ablation=True))
    lines[0]["curve"][-1][2] = None
    (comparison,) = figures.compare(lines)
    assert [line["learning_rate"] for line in comparison.runs("LoRA")] == [1e-3] * 3
    assert [line["learning_rate"] for line in comparison.runs("random")] == [1e-2]
    shown = table.comparison_table(comparison, "answers loss", "loss", comparison.methods(ablations=False)).splitlines()
    assert shown[0] == "| method | learning rate | seeds | loss | minus LoRA | minus random |"
    assert shown[2] == "| LoRA | 0.001 (edge) | 3 | 0.3200 ± 0.0200 | – | +0.1000 |"
    assert shown[4].startswith("| IST, mu 100 | 0.001 | 3 | 0.4220 ± 0.0220 | **+0.1020 [+0.0970, +0.1070]** |")
    assert "| mu 1 | 0.001 | 3 | 38.0 ± 2.0 |" in "\n".join(table.ablation_section([comparison]))
    rows = {row[2]: row for row in table.summary_rows([comparison]) if row[0].startswith("mawps")}
    assert rows["LoRA"][3:5] == ("68.0 [63.0, 73.0]", "–")
    assert rows["IST, mu 100"][4] == "-10.2 [-10.7, -9.7]"
    assert rows["random"][6:] == ("x.jsonl", "abc")
    assert ("sst2", "–", "–", "not measured", "–", "–", "–", "–") in table.summary_rows([comparison])


def test_what_is_no_number_is_no_figure() -> None:
    broken = line_of("LoRA", 0, 0.5, test={"answers": {"loss": None}}, curve=[[9, 1.0, None]])
    assert figures.figures(broken) == {}
    assert figures.compare([broken])[0].table(["LoRA"]) == {}


def test_methods_stand_in_the_order_of_the_plans() -> None:
    names = ["DoRA", "mu 1000", "IST, mu 10", "unknown", "mu 1", "LoRA", "N_u 4"]
    (comparison,) = figures.compare([line_of(name, 0, 0.3) for name in names])
    assert comparison.methods() == ["LoRA", "IST, mu 10", "N_u 4", "mu 1", "mu 1000", "DoRA", "unknown"]


def test_equal_time_is_beside_the_reference_at_equal_steps() -> None:
    lines = [line_of("LoRA", seed, 0.3) for seed in (0, 1)]
    lines += [line_of("IST, mu 100", seed, 0.2, budget="seconds", steps=14) for seed in (0, 1)]
    (comparison,) = figures.compare(lines)
    shown = "\n".join(table.comparison_section([comparison]))
    assert "at the time that LoRA takes" in shown
    assert "2 seeds." in shown
    assert "| IST, mu 100 | 0.001 | 14 | 80.0 ± 0.0 | **+10.0 [+10.0, +10.0]** |" in shown


def test_questions_are_answered_by_what_is_measured() -> None:
    lines = [line_of("LoRA", seed, 0.3) for seed in range(3)] + [line_of("random", seed, 0.5) for seed in range(4)]
    lines.append(line_of("IST, mu 10", 0, 0.4))
    heading, shown = questions.question_section(figures.compare(lines))
    assert heading == "**mawps, 9 steps of 2 rows, at equal steps.**"
    rows = [line.split(" | ")[:4] for line in shown.splitlines()[2:]]
    assert rows == [
        ["| some of the layers, or all", "random − LoRA", "3", "**-20.0 [-20.0, -20.0]**"],
        ["| ", "IST, mu 10 − LoRA", "1", "-10.0"],
        ["| by importance, or at random", "IST, mu 10 − random", "1", "+10.0"],
    ]


def test_every_rate_is_shown_and_the_chosen_one_is_bold() -> None:
    lines = [line_of("LoRA", 0, 0.3), line_of("LoRA", 0, 0.9, rate=1e-2), line_of("LoRA", 1, 0.1)]
    lines.append(line_of("IST", 0, 0.5, rate=2e-3))
    caption, shown = table.rate_section(figures.compare(lines))
    assert caption.startswith("**mawps, 9 steps of 2 rows, the first seed.**")
    assert shown.splitlines()[2] == "| LoRA | **0.001: 0.3000, 70.0** | 0.01: 0.9000, 10.0 |"
    assert shown.splitlines()[3] == "| IST | **0.002: 0.5000, 50.0** | – |"


def test_scores_are_compared_over_seeds_and_with_the_importance() -> None:
    scores = ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0])
    lines = [line_of("IST", n, 0.3, scores=own, choices=[0, 9, 3, 6]) for n, own in enumerate(scores)]
    found = line_of("importance", 9, 0.3, kind="importance", importance=[0.1, 0.2, 0.3, 0.4])
    other = {**found, "importance": [0.4, 0.3, 0.2, 0.1], "setting": {**found["setting"], "batch_size": 7}}
    lines += [line_of("random", n, 0.3, scores=None, choices=[3] * 4) for n in (0, 1)]
    everything = [*lines, found, other]
    _, shown = layers.layer_section(figures.compare(everything), everything)
    assert shown.splitlines()[2:] == ["| IST | 0.0 | 100.0 | +0.67 | +0.83 (+0.67 to +1.00) |"]
    said = [*layers.importance_section(everything)]
    assert "rises by +0.1000 to +0.4000 nats, by +0.3000 in the middle of 4 layers (x.jsonl)" in said[0]
    assert "agree with tau -1.00; of the 8 most important layers they share 4" in said[2]


def test_the_figure_has_what_is_measured_with_enough_seeds(tmp_path: Path) -> None:
    lines = [line_of(name, n, 0.3 + 0.01 * n * n) for n in range(3) for name in ("LoRA", "random")]
    lines += [line_of("LISA", n, 0.3) for n in range(2)]
    shown = [*figure.panels(figures.compare(lines))]
    assert [(task, title) for task, title, _ in shown] == [("mawps", "exact match, %")]
    assert [*shown[0][2]] == ["random"]
    figure.draw(tmp_path / "a" / "x.png", shown, "at equal steps")
    assert (tmp_path / "a" / "x.png").stat().st_size > 1000


def test_the_figure_of_halves_is_of_one_model_with_its_own_end(tmp_path: Path) -> None:
    """Of the model with the most focused trainings; and none of the paper's plans."""
    names = ("LoRA", "focused, half", "LoRA, time of half", "even, half")
    lines = [line_of(name, n, 0.3 + 0.01 * n * n, study="focused") for n in range(3) for name in names]
    lines += [line_of("LoRA", n, 0.5) for n in range(5)]
    other = [{**line, "rows_end": "</s>"} for line in lines[:6]]
    (task, title, found), *others = figure.halves(figures.compare([*lines, *other]))
    assert (task, title, others) == ("mawps", "exact match, %", [])
    assert [*found] == ["focused half", "focused half, equal time", "even half"]
    assert not [*figure.panels(figures.compare(lines))]


def test_trainings_that_end_rows_otherwise_stay_apart(tmp_path: Path) -> None:
    line = line_of("LoRA", 0, 0.3)
    text = "".join(json.dumps(each) + "\n" for each in (line, {**line, "rows_end": "</s>"}))
    (tmp_path / "a.jsonl").write_text(text)
    assert [found.get("rows_end") for found in figures.load_lines(tmp_path)] == [None, "</s>"]


def test_what_was_timed_twice_has_both_times(tmp_path: Path) -> None:
    timed = line_of("LoRA", 0, 0.3, kind="speed", step_seconds=0.3, peak_memory_bytes=2**30)
    for name, seconds in {"a": 0.3, "b": 0.4}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**timed, "step_seconds": seconds}) + "\n")
    lines = figures.load_lines(tmp_path)
    assert [line["times"] for line in lines] == [[0.3, 0.4]]
    assert "| LoRA | 300 and 400 | 1.00 | 1.00 |" in "\n".join(table.speed_section(lines))


def test_trainings_that_ran_twice_are_compared_with_themselves(tmp_path: Path) -> None:
    lines = [line_of("LoRA", seed, 0.3) for seed in (0, 1)]
    again = [
        {**line, "test": {**line["test"], "exact answers": {"accuracy": accuracy}}}
        for line, accuracy in zip(lines, (0.8, 0.4), strict=True)
    ]
    again.append(line_of("random", 0, 0.9))  # of which there is no first one
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "y.jsonl").write_text("".join(json.dumps(line) + "\n" for line in again))
    shown, origin = repeats.repeat_section(tmp_path, lines)
    assert shown.splitlines()[2] == "| mawps | exact match, % | 2 | 20.0 | 30.0 |"
    assert shown.splitlines()[3] == "| mawps | loss of the answers, nats a token | 2 | 0.0000 | 0.0000 |"
    assert origin == "GPU, commit abc; again/y.jsonl."
    assert [*repeats.repeat_section(tmp_path / "again", lines)] == []


def test_a_difference_that_ran_twice_is_shown_by_run_and_averaged(tmp_path: Path) -> None:
    lines = [line_of("LoRA", seed, 0.3) for seed in (0, 1)] + [line_of("focused, half", seed, 0.2) for seed in (0, 1)]
    again = [
        {**line, "test": {**line["test"], "exact answers": {"accuracy": accuracy}}}
        for line, accuracy in zip(lines, (0.3, 0.3, 0.5, 0.5), strict=True)
    ]
    again += [{**line, "model": "another", "test": {"exact answers": {"accuracy": 0.9}}} for line in lines]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "y.jsonl").write_text("".join(json.dumps(line) + "\n" for line in again))
    *_, shown = repeats.repeat_section(tmp_path, lines)
    expected = "**+10.0 [+10.0, +10.0]** | **+20.0 [+20.0, +20.0]** | **+15.0 [+15.0, +15.0]** |"
    assert shown.splitlines()[2:] == [f"| mawps: exact match, % | focused, half − LoRA | 2 | {expected}"]


def test_every_table_of_the_paper_is_there() -> None:
    paper = json.loads(table.PAPER.read_text(encoding="utf-8"))
    assert [*paper["tables"]] == ["2", "3", "4", "5", "10", "11", "12"]
    known = {name for file in PLANS for name in plan.read_plan(file)["methods"]}
    for entry in paper["tables"].values():
        width = len(entry["columns"])
        assert all(len(values) == width for _, values in entry["rows"])
        assert len(entry["ours"]["figures"]) == width
        assert {*entry["ours"]["rows"].values()} <= known
    shown = "\n".join(table.paper_section(paper, []))
    assert shown.count("Ours: Not measured yet.") == 7


def test_the_page_holds_what_the_results_say(tmp_path: Path) -> None:
    """`make tables` has been run since the last measurement."""
    pages = (table.PAGE, table.SUMMARY_PAGE, table.README)
    copies = [Path(shutil.copy(page, tmp_path)) for page in pages]
    table.main(table.RESULTS, *copies)
    assert [copy.read_text() for copy in copies] == [page.read_text(encoding="utf-8") for page in pages]


def test_a_question_says_on_which_task_lora_has_how_many_steps() -> None:
    question = verdict.Question("half − LoRA, equal time", "half", "LoRA, time of half")

    def asked(steps: dict[str, int]) -> str:
        lines = [line_of("LoRA, time of half", 0, 0.5, task=task, steps=own) for task, own in steps.items()]
        return verdict.asked(question, {comparison.task: comparison for comparison in figures.compare(lines)})

    assert asked({"mawps": 7, "sst2": 7}) == "half − LoRA, equal time (7 steps)"
    assert asked({"mawps": 7, "sst2": 8}) == "half − LoRA, equal time (7 steps on MAWPS; 8 steps on SST-2)"


def test_longer_focused_trainings_have_a_table_of_their_own_but_in_the_short_form() -> None:
    settings: dict[str, Any] = {"study": "focused", "task": "mawps"}
    lines = [line_of(name, n, 0.1 * n, **settings) for n in range(2) for name in ("LoRA", "focused, half")]
    longer = [line_of(name, 0, 0.3, steps=21, base_steps=21, **settings) for name in ("LoRA", "focused, half")]
    one, _, other, shown = verdict.verdict_section(figures.compare(lines + longer))
    assert "21 steps" not in one
    assert "21 steps" in other
    assert "(one seed)" in shown
    assert [*verdict.verdict_section(figures.compare(lines + longer), short=True)] == [one, _]
    assert not [*verdict.verdict_section(figures.compare(longer), short=True)]


def test_the_verdict_says_which_method_is_better_and_whether_that_is_beyond_chance() -> None:
    clear = [line_of(name, n, loss + 0.001 * n) for n in range(3) for name, loss in (("LoRA", 0.3), ("random", 0.5))]
    model, shown = verdict.verdict_section(figures.compare(clear))
    assert model.startswith("**small**")
    assert "| random quarter at each step − LoRA | **-20.0 [-20.0, -20.0]** ↓ |" in shown
    vague = [
        line_of(name, n, 0.3 + (0.1 if name == "LoRA" else 0.05) * n % 0.2)
        for n in range(3)
        for name in ("LoRA", "random")
    ]
    _, shown = verdict.verdict_section(figures.compare(vague))
    assert "**" not in shown
    assert "IST" not in shown
