"""What `ist analyse` shows: the layers in the order of their importance, and the removals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ...experiments.analysis import MIN_BATCHES, have_moved
from ..console import PlainConsole

__all__ = ["AnalyseDisplay"]


class AnalyseDisplay:
    """The console of an analysis."""

    def __init__(self) -> None:
        self.console = PlainConsole()
        if not self.console.is_terminal:
            self.console.width = 160  # in a file a table's row is a line

    def begin(self, folder: Path, run: Any, analysis: Any) -> None:
        """What is about to be measured."""
        problems = f", {len(analysis.problems)} problems" if analysis.problems else ""
        self.console.print(
            f"{folder}: {run.model.model_name_or_path}, {run.ist.adapter}, {run.ist.method}; {len(analysis.layers)} "
            f"layers, {count_batches(len(analysis.batches))} of validation rows{problems}",
            soft_wrap=True,
        )

    def end(self, result: Mapping[str, Any], folder: Path, further: str, picture: Path | None) -> None:
        """The tables, and where everything is."""
        print_line = self.console.print
        tokens = f"{count_batches(result['num_batches'])}, {result['num_tokens']} tokens"
        print_line(f"validation loss {result['loss']:.4f} nats a token ({tokens})", soft_wrap=True)
        print_line(Text("\ntrue importance: the loss without a layer's response, minus the loss with it", "bold"))
        print_line(importance_table(result))
        if not result["intervals"]:
            found = count_batches(result["num_batches"])
            print_line(
                f"no intervals: validation has {found}, and they need {MIN_BATCHES}: give a smaller "
                "--per_device_eval_batch_size, or more validation rows",
                soft_wrap=True,
            )
        if correlation := result["rank_correlation"]:
            print_line(correlation_text(correlation, result["learned"]), soft_wrap=True)
        print_line(Text(f"\nlayers taken out one after the other ({result['order']})", "bold"))
        print_line(removal_table(result["removal"]))
        print_line(f"\nall numbers: {folder / 'analysis.json'}", soft_wrap=True)
        print_line(f"to tune only the most or least important layers: {further}", soft_wrap=True)
        if picture:
            print_line(f"picture: {picture}", soft_wrap=True)


def count_batches(number: int) -> str:
    """`1 batch`, `2 batches`."""
    return f"{number} batch{'' if number == 1 else 'es'}"


def importance_table(result: Mapping[str, Any]) -> Table:
    """Every layer, the most important first."""
    table = Table(show_edge=False, pad_edge=False)
    for column in ("layer", "importance", "95% interval", *(["learned"] if result["learned"] else [])):
        table.add_column(column)
    importance, intervals = result["importance"], result["intervals"]
    for layer in sorted(range(len(importance)), key=lambda index: -importance[index]):
        interval = f"[{intervals[layer][0]:+.4f}, {intervals[layer][1]:+.4f}]" if intervals else "–"
        learned = [f"{result['learned'][layer]:+.3f}"] if result["learned"] else []
        table.add_row(str(layer), f"{importance[layer]:+.4f}", interval, *learned)
    return table


def correlation_text(correlation: Mapping[str, Any], learned: Sequence[float]) -> str:
    """The rank correlation in words."""
    if not have_moved(learned):
        return (
            "Kendall's tau between true and learned importance: none, the learned scores never moved "
            f"({min(learned):+.1e} to {max(learned):+.1e}), so layers were chosen nearly at random"
        )
    if correlation["tau"] is None:
        return "Kendall's tau between true and learned importance: none, one of them is the same for all layers"
    interval = f" [{correlation['low']:+.2f}, {correlation['high']:+.2f}]" if correlation["low"] is not None else ""
    return f"Kendall's tau between true and learned importance: {correlation['tau']:+.2f}{interval}"


def removal_table(removal: Mapping[str, Any]) -> Table:
    """Losses and exact match at a few points of both removals."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("layers removed")
    for name in removal:
        table.add_column(f"loss, {name.replace('_', ' ')}")
    with_answers = [name for name in removal if removal[name]["accuracy"]]
    for name in with_answers:
        table.add_column(f"exact, {name.replace('_', ' ')}")
    last = len(next(iter(removal.values()))["order"])
    for number in sorted({round(last * eighth / 8) for eighth in range(9)}):
        losses = [f"{removal[name]['loss'][number]:.4f}" for name in removal]
        answers = [f"{removal[name]['accuracy'][number]:.0%}" for name in with_answers]
        table.add_row(f"{number} of {last}", *losses, *answers)
    return table
