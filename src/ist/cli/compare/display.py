"""What `ist compare` shows: what runs, each run's figures when it is done, and the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ...experiments.comparison import is_share
from ..console import PlainConsole
from ..step_lines import progress_line, read_step
from .recipe import CompareRecipe

__all__ = ["CompareDisplay", "difference_text", "figure_text"]

BUDGETS = {"steps": "equal steps", "seconds": "equal training time"}


class CompareDisplay:
    """The console of a comparison. Names come out as they are: nothing in them is taken for rich's markup."""

    def __init__(self) -> None:
        self.console = PlainConsole()
        if not self.console.is_terminal:
            self.console.width = 160  # in a file a table's row is a line

    def begin(self, recipe: CompareRecipe, folder: Path) -> None:
        """What is about to be compared."""
        self.console.print(
            Text(recipe.name, "bold"),
            f": {count(len(recipe.methods), 'method')} × {count(len(recipe.seeds), 'seed')}, into {folder}",
            sep="",
            soft_wrap=True,
        )

    @contextmanager
    def running(self, method: str, seed: int | None, rate: float | None, what: str) -> Iterator[Callable[[str], None]]:
        """Say what runs while it does, with its last line or its step; yields what takes the lines."""
        with RunningLine(self.console, run_name(method, seed, rate, what)) as line:
            yield line.take

    def done(self, run: Mapping[str, Any]) -> None:
        """A run's figures in a line."""
        figures = ", ".join(f"{name} {figure_text(name, value)}" for name, value in run["figures"].items())
        name = run_name(run["method"], run["seed"], run["learning_rate"], run["budget"])
        time = f"{run['num_steps']} steps in {run['step_seconds']:.1f} s"
        self.console.print(f"{name}: {time}, {figures}", soft_wrap=True)

    def chosen(self, method: str, rates: Mapping[str, Any]) -> None:
        """The learning rates that were tried, and which one was taken."""
        tried = ", ".join(f"{rate} gives {loss:.4f}" for rate, loss in rates["tried"].items())
        edge = " (at the edge of the grid: a wider one may hold a better one)" if rates["at_the_edge"] else ""
        self.console.print(
            f"{method}: learning rate {rates['chosen']:g}{edge}; validation loss: {tried}", soft_wrap=True
        )

    def end(self, summary: Mapping[str, Any], folder: Path, pictures: Sequence[Path]) -> None:
        """The tables, and where everything is."""
        for budget, figures in summary["table"].items():
            for figure, rows in figures.items():
                seeds = max(len(row["values"]) for row in rows.values())
                title = f"{figure}, {BUDGETS[budget]}, {count(seeds, 'seed')}"
                self.console.print(Text(f"\n{title}", "bold"), soft_wrap=True)
                self.console.print(figure_table(figure, rows))
        self.console.print(Text("\ncost", "bold"))
        self.console.print(cost_table(summary["runs"]))
        self.console.print(
            "± is the standard deviation over seeds; [ ] the 95% interval of the difference, paired over seeds.",
            soft_wrap=True,
        )
        self.console.print(f"all numbers: {folder / 'compare.json'}", soft_wrap=True)
        for picture in pictures:
            self.console.print(f"picture: {picture}", soft_wrap=True)


class RunningLine:
    """On a terminal: what runs, its last line, and while it trains the progress line of `ist train`; then nothing."""

    def __init__(self, console: Console, name: str) -> None:
        self._name = name
        self._spinner = Spinner("dots", Text(name))
        self._progress = progress_line(console)
        self._task: Any = None
        self._trains = False
        self._live = Live(console=console, transient=True, get_renderable=self._show, auto_refresh=console.is_terminal)

    def __enter__(self) -> RunningLine:
        if self._live.auto_refresh:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def take(self, line: str) -> None:
        """Show a line that the run has printed."""
        told = read_step(line)
        if told is None:
            self._trains = self._trains and not self._progress.finished
            self._spinner.update(text=Text(self._name if self._trains else f"{self._name}: {line}"))
            return
        if not self._trains:
            self._trains = True
            self._spinner.update(text=Text(self._name))
        if self._task is None:
            self._task = self._progress.add_task("", total=told.total, completed=told.step, layers="", loss="")
        self._progress.update(self._task, completed=told.step, layers=told.layers, loss=told.loss)
        if told.step == told.total:
            self._live.refresh()

    def _show(self) -> RenderableType:
        return Group(self._spinner, self._progress.get_renderable()) if self._trains else self._spinner


def count(number: int, name: str) -> str:
    """A number of things."""
    return f"{number} {name}{'' if number == 1 else 's'}"


def run_name(method: str, seed: int | None, rate: float | None, what: str) -> str:
    """A run in words."""
    words = [method, f"seed {seed}" if seed is not None else "", f"learning rate {rate:g}" if rate else ""]
    return ", ".join(word for word in [*words, BUDGETS.get(what, what) if what != "steps" else ""] if word)


def figure_table(figure: str, rows: Mapping[str, Any]) -> Table:
    """A figure of all methods, with a column of differences for each method that others are paired with."""
    paired = {other for row in rows.values() for other in row["differences"]}
    others = [method for method in rows if method in paired]
    table = Table(show_edge=False, pad_edge=False)
    for column in ("method", "mean", *(f"minus {other}" for other in others)):
        table.add_column(Text(column))
    for method, row in rows.items():
        spread = "" if row["deviation"] is None else f" ± {figure_text(figure, row['deviation'])}"
        differences = [difference_text(figure, row["differences"].get(other)) for other in others]
        table.add_row(Text(method), f"{figure_text(figure, row['mean'])}{spread}", *differences)
    return table


def cost_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Time and memory of each method, the mean over its runs."""
    table = Table(show_edge=False, pad_edge=False)
    for column in ("method", "budget", "steps", "seconds a step", "seconds", "peak memory"):
        table.add_column(column)
    for method, budget in dict.fromkeys((run["method"], run["budget"]) for run in runs):
        own = [run for run in runs if (run["method"], run["budget"]) == (method, budget)]
        steps, seconds, memory = (
            sum(run[name] for run in own) / len(own) for name in ("num_steps", "step_seconds", "peak_memory_bytes")
        )
        table.add_row(
            Text(method), BUDGETS[budget], f"{steps:.0f}", f"{seconds / steps:.3f}", f"{seconds:.1f}",
            f"{memory / 2**30:.2f} GiB",
        )  # fmt: skip
    return table


def figure_text(figure: str, value: float) -> str:
    """A figure as a reader wants it: shares in percent, losses in nats, scores as they are."""
    return f"{value:.1%}" if is_share(figure) else f"{value:.4f}"


def difference_text(figure: str, difference: Mapping[str, Any] | None) -> str:
    """A difference with its interval; shares in percentage points."""
    if difference is None:
        return "–"
    factor, digits = (100, 1) if is_share(figure) else (1, 4)
    mean, low, high = (difference[name] for name in ("mean", "low", "high"))
    text = f"{mean * factor:+.{digits}f}"
    return text if low is None else f"{text} [{low * factor:+.{digits}f}, {high * factor:+.{digits}f}]"
