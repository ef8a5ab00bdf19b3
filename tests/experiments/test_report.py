"""The picture of a run."""

import itertools
import json
import math
import random
import shutil
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ist.experiments.report import draw_report, draw_side_by_side
from ist.experiments.report.axes import number_layers, number_steps
from ist.experiments.report.lines import GAP, end_labels, titles
from ist.experiments.report.pictures import MAX_POINTS, PICTURE_FILE, draw_sampled, thinned
from ist.experiments.report.run import RunHistory
from ist.runs.history import HISTORY_FILE, History

NUM_LAYERS = 12


def write_run(
    folder: Path,
    num_steps: int = 60,
    seed: int = 0,
    updates: bool = True,
    logs: bool = True,
    skip: bool = False,
    spread: float = 0.3,
) -> Path:
    """A history as a run writes it, of invented numbers."""
    generator = random.Random(seed)
    history = History(folder / HISTORY_FILE)
    history.write(
        "run",
        step=0,
        layers=[f"model.layers.{i}" for i in range(NUM_LAYERS)],
        config={"update_interval": 2},
        versions={},
    )
    scores = [0.0] * NUM_LAYERS
    for step in range(1, num_steps + 1):
        history.write("step", step=step, active=sorted(generator.sample(range(NUM_LAYERS), 3)))
        if updates and step % 10 == 0:
            skipped = "losses not finite" if skip and step in (10, 30) else None
            losses = [math.nan if skipped else generator.uniform(0.5, 1) for _ in range(3)]
            if not skipped:
                scores = [score + generator.gauss(0, spread) for score in scores]
            history.write(
                "importance", step=step, candidates=[[0, 1, 2], [3, 4, 5], [6, 7, 8]], losses=losses,
                rewards=[], importance=scores, skipped=skipped,
            )  # fmt: skip
        if logs and step % 5 == 0:
            history.write("log", step=step, loss=2 / step + generator.random() / 10, learning_rate=1e-4)
        if logs and step % 30 == 0:
            history.write("log", step=step, eval_loss=1 / step)
    return folder


def read_picture(file: Path) -> np.ndarray:
    """Pixels of a PNG, checked for being a picture with something on it."""
    content = file.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(content) > 10_000
    pixels = matplotlib.image.imread(file)
    height, width, _ = pixels.shape
    assert (height, width) == (900, 1350)
    # On each of the four panels, of which the left ones are wider, something is drawn.
    for rows in (slice(0, height // 2), slice(height // 2, height)):
        for columns in (slice(0, width * 3 // 5), slice(width * 4 // 5, width)):
            assert pixels[rows, columns, :3].std() > 0.02
    return pixels


def test_a_run_is_drawn_into_its_folder(tmp_path):
    folder = write_run(tmp_path)
    history = (folder / HISTORY_FILE).read_bytes()
    picture = draw_report(str(folder))
    assert picture == folder / PICTURE_FILE
    pixels = read_picture(picture)
    assert (folder / HISTORY_FILE).read_bytes() == history

    red, blue = share_red_and_blue(pixels)
    assert red > 0.01  # scores above zero
    assert blue > 0.01  # scores below zero


def share_red_and_blue(pixels: np.ndarray) -> tuple[float, float]:
    difference = pixels[..., 0] - pixels[..., 2]
    return float((difference > 0.3).mean()), float((difference < -0.3).mean())


def test_scores_that_never_moved_are_drawn_in_neither_colour(tmp_path):
    pixels = read_picture(draw_report(write_run(tmp_path, spread=0)))
    assert max(share_red_and_blue(pixels)) < 0.005


def test_the_same_history_gives_the_same_picture_and_another_another(tmp_path):
    first = read_picture(draw_report(write_run(tmp_path / "first")))
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    assert np.array_equal(read_picture(draw_report(tmp_path / "copy")), first)
    other = read_picture(draw_report(write_run(tmp_path / "other", seed=1)))
    assert float((np.abs(other - first).max(axis=-1) > 0.1).mean()) > 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"updates": False},
        {"logs": False},
        {"num_steps": 1},
        {"num_steps": 10, "logs": False},
        {"skip": True},
    ],
    ids=str,
)
def test_runs_that_lack_something_are_drawn(tmp_path, options):
    read_picture(draw_report(write_run(tmp_path, **options)))


def test_a_history_whose_last_line_was_cut_is_drawn(tmp_path):
    write_run(tmp_path)
    with (tmp_path / HISTORY_FILE).open("a", encoding="utf-8") as file:
        file.write('{"event": "step", "st')
    read_picture(draw_report(tmp_path))


def test_a_folder_without_a_history_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist: give the folder of a run") as error:
        draw_report(tmp_path)
    assert str(tmp_path / HISTORY_FILE) in str(error.value)


@pytest.mark.parametrize("begun", [False, True], ids=["empty", "begun"])
def test_a_history_without_a_step_is_refused(tmp_path, begun):
    history = History(tmp_path / HISTORY_FILE)
    if begun:
        history.write("run", step=0, layers=["a", "b"])
    with pytest.raises(ValueError, match="has no steps: let the run do at least one") as error:
        draw_report(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert not (tmp_path / PICTURE_FILE).exists()


def test_a_history_without_the_runs_line_is_refused(tmp_path):
    """Such as a SparseTuner writes in an own training loop."""
    history = History(tmp_path / HISTORY_FILE)
    history.write("step", step=1, active=[0, 1])
    with pytest.raises(ValueError, match="lacks the line of its run, which names the layers"):
        draw_report(tmp_path)


def test_the_path_of_the_history_itself_is_taken(tmp_path):
    write_run(tmp_path)
    assert draw_report(tmp_path / HISTORY_FILE) == tmp_path / PICTURE_FILE


RUN = {"event": "run", "step": 0, "layers": ["a", "b"], "config": {"update_interval": 2}}
STEP = {"event": "step", "step": 1, "active": [0, 1]}
UPDATE = {"event": "importance", "step": 2, "losses": [0.5], "importance": [0.1, 0.2]}


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([RUN, {**STEP, "active": [2]}], "step 1 of layer 2, and its run has 2 layers"),
        ([RUN, {**STEP, "active": [10**12]}], "of layer 1000000000000"),
        ([RUN, {"event": "step", "step": 1}], "a line 'step' without 'active'"),
        ([RUN, {"event": "step", "active": [0]}], "a line 'step' without 'step'"),
        ([RUN, STEP, {"event": "importance", "step": 2, "losses": []}], "a line 'importance' without 'importance'"),
        ([RUN, STEP, {**UPDATE, "importance": [0.1]}], "1 scores at step 2, and its run has 2 layers"),
        ([RUN, STEP, {**UPDATE, "importance": [0.1, None]}], "scores at step 2 that are not numbers"),
        ([RUN, STEP, {**UPDATE, "importance": [0.1, "high"]}], "'importance' is list"),
        ([RUN, STEP, {**UPDATE, "importance": [1e308, -1e308]}], "scores or losses at step 2 that no training reaches"),
        ([RUN, STEP, {"event": "log", "loss": 1.0}], "a line 'log' without 'step'"),
        ([RUN, STEP, {"event": "log", "step": 1, "loss": 1e308}], "'loss' is 1e[+]308, which no training reaches"),
        ([{**RUN, "layers": []}, STEP], "names 0 layers: 1 to 1024 are drawn"),
        ([{**RUN, "layers": ["a"] * 10**6}, STEP], "names 1000000 layers: 1 to 1024 are drawn"),
        ([{"event": "run", "step": 0}, STEP], "lacks the line of its run"),
        ([RUN, {**STEP, "step": 5}, {**STEP, "step": 4}], "has step 4 after step 5 of 'step'"),
        ([RUN, STEP, STEP], "has step 1 after step 1 of 'step': it is damaged, or of two runs"),
        ([RUN, STEP, UPDATE, UPDATE], "has step 2 after step 2 of 'importance'"),
    ],
    ids=range(17),
)
def test_lines_that_do_not_fit_together_are_one_line_with_the_file(tmp_path, events, said):
    file = tmp_path / HISTORY_FILE
    file.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    with pytest.raises(ValueError, match=said) as error:
        draw_report(tmp_path)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / PICTURE_FILE).exists()


@pytest.mark.parametrize("config", [{}, {"update_interval": "often"}, {"update_interval": 0}], ids=str)
def test_a_run_of_an_unknown_interval_is_drawn(tmp_path, config):
    events = [{**RUN, "config": config}, STEP, UPDATE, {"event": "log", "step": 1, "loss": None, "eval_loss": 1}]
    (tmp_path / HISTORY_FILE).write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    assert draw_report(tmp_path).is_file()


def test_a_long_history_is_thinned():
    assert thinned(list(range(MAX_POINTS))) == list(range(MAX_POINTS))
    few = thinned(list(range(10**6)))
    assert MAX_POINTS <= len(few) < 2 * MAX_POINTS
    assert few[:2] == [0, 500]


@pytest.mark.parametrize(("number", "low", "high"), [(1, -0.5, 0.5), (2, -0.5, 1.5), (4, -0.5, 3.5), (30, -0.5, 29.5)])
def test_layers_and_steps_have_no_halves(number, low, high):
    figure = Figure()
    axes = figure.add_subplot()
    axes.set(xlim=(low, high), ylim=(low, high))
    number_layers(axes.yaxis)
    number_steps(axes.xaxis)
    for axis in (axes.xaxis, axes.yaxis):
        ticks = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
        assert ticks
        assert all(tick == round(tick) for tick in ticks), ticks


def test_runs_are_drawn_side_by_side(tmp_path):
    """Figure 4: what one model learned of its layers on two tasks."""
    folders = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("commonsense", "arithmetic"))]
    picture = draw_side_by_side(folders)
    assert picture == tmp_path / "commonsense" / "importance-side-by-side.png"
    pixels = matplotlib.image.imread(picture)
    middle = pixels.shape[1] // 2
    assert pixels[:, :middle, :3].std() > 0.02
    assert pixels[:, middle:, :3].std() > 0.02
    swapped = draw_side_by_side(folders[::-1])
    assert swapped.parent == folders[1]
    assert not np.array_equal(matplotlib.image.imread(swapped), pixels)
    assert draw_side_by_side([*folders, folders[0]]).is_file()


def test_a_run_that_learned_nothing_is_not_drawn_beside_others(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", updates=False)]
    with pytest.raises(ValueError, match="b learned no importance to draw beside others: give runs of --method ist"):
        draw_side_by_side(folders)
    assert not (folders[0] / "importance-side-by-side.png").exists()


def test_panels_are_named_by_what_tells_folders_apart():
    assert titles([Path("/runs/boolq"), Path("/runs/gsm8k")]) == ["boolq", "gsm8k"]
    assert titles([Path("/a/seed-0"), Path("/b/seed-0")]) == ["a/seed-0", "b/seed-0"]
    assert titles([Path("/a/seed-0"), Path("/a/seed-0")]) == ["seed-0", "seed-0"]


def test_names_of_layers_stand_apart():
    ends = [0.5 + number / 1000 for number in range(30)]
    places = end_labels(ends, GAP)
    assert sorted(places) == [0, 1, 2, 27, 28, 29]
    heights = [places[layer] for layer in sorted(places)]
    assert all(above - below >= GAP - 1e-9 for below, above in pairwise(heights))
    assert end_labels([0.1, 0.9], GAP) == {0: 0.1, 1: 0.9}


FOCUS = {"names": ["layers.0", "layers.1", "layers.2"], "layers": [0, 2], "scores": [0.5, 0.1, 2.0]}


@pytest.mark.parametrize("scores", [FOCUS["scores"], None])
def test_a_focused_run_shows_its_scores_over_the_depth(tmp_path, scores):
    write_run(tmp_path)
    sampled = share_red_and_blue(read_picture(draw_report(tmp_path)))
    (tmp_path / "focus.json").write_text(json.dumps({**FOCUS, "scores": scores, "criterion": "gradient"}))
    focused = share_red_and_blue(read_picture(draw_report(tmp_path)))
    assert focused != sampled
    assert focused[0] > 0.03  # the bars of two of three layers


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", json.dumps({**FOCUS, "scores": [1, 2]}), json.dumps({**FOCUS, "layers": [3]}),
        json.dumps({**FOCUS, "scores": [1, 2, float("nan")]}), json.dumps({**FOCUS, "names": 3}),
        json.dumps({**FOCUS, "scores": "many"}), json.dumps({**FOCUS, "criterion": "$\\bad{$"}), "[" * 100_000,
        json.dumps({**FOCUS, "layers": [float("inf")]}), json.dumps({**FOCUS, "scores": [1, 2, 1e308]}),
    ],
)  # fmt: skip
def test_a_damaged_focus_is_one_line(tmp_path, text):
    write_run(tmp_path)
    (tmp_path / "focus.json").write_text(text)
    with pytest.raises(ValueError, match=r"focus\.json is damaged") as error:
        draw_report(tmp_path)
    assert "\n" not in str(error.value)


def invented(num_layers: int, num_steps: int, size: float) -> RunHistory:
    """A run whose scores are of a size, measured ten times."""
    generator = random.Random(0)
    every = num_steps // 10
    steps = [{"step": step, "active": [step % num_layers]} for step in range(1, num_steps + 1)]
    updates = [
        {"step": step, "losses": [2.0], "importance": [generator.gauss(0, size) for _ in range(num_layers)]}
        for step in range(every, num_steps + 1, every)
    ]
    return RunHistory(num_layers, every, steps, updates, [{"step": every, "loss": 2.0}])


@pytest.mark.parametrize(
    ("num_layers", "num_steps", "size"), [(12, 100, 1.0), (32, 2000, 1e-4), (48, 450, 30.0), (80, 10_000, 5e4)]
)
def test_numbers_on_axes_are_whole_and_apart(num_layers: int, num_steps: int, size: float) -> None:
    figure = Figure(figsize=(9, 6), layout="constrained", dpi=150)
    canvas = FigureCanvasAgg(figure)
    draw_sampled(figure, invented(num_layers, num_steps, size))
    canvas.draw()
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert panels["Importance over time"].get_xlim() == panels["Loss"].get_xlim()
    assert panels["Loss"].lines[0].get_marker() == "o"  # the only logged loss
    for title, axes in panels.items():
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            labels = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            shown = [label for label in labels if label.get_visible() and label.get_text()]
            texts = [label.get_text() for label in shown]
            if axis.get_label_text() in ("layer", "optimizer step"):
                assert 3 <= len(texts) <= 10, title
                assert all(text.replace(",", "").isdecimal() for text in texts), title
            boxes = [label.get_window_extent() for label in shown]
            assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes)), (title, texts)


def test_a_picture_takes_the_place_of_a_link_and_not_of_what_it_leads_to(tmp_path):
    """A run's folder may come from a stranger."""
    write_run(tmp_path / "run")
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (tmp_path / "run" / PICTURE_FILE).symlink_to(mine)
    picture = draw_report(tmp_path / "run")
    assert mine.read_text() == "precious"
    assert not picture.is_symlink()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "run").glob(".*"))
