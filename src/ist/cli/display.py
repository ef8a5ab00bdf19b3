"""What `ist train` shows: a header, a progress line with the active layers, and the figures before and after."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from ..adapters.layers import parameters_outside
from ..adapters.whole_layers import layers_to_train
from ..integrations.trainer import IST
from ..method.registry import least_layers, make_selector, selector_factory, what_trains
from ..step.announce import describe_fused
from .console import PlainConsole
from .step_lines import StepLine, progress_line, tell_step
from .train.header import adapter_line, data_line

__all__ = ["Display", "TrainingProgress", "device_name", "layer_map", "peak_memory"]


SHARES = ("accuracy", "exact_match", "label_accuracy")
"""Figures that are shares of right answers."""


class Display:
    """The console of a run. On a terminal the progress line moves; elsewhere each log is a line.

    Names and texts come out as they are: nothing in them is taken for rich's markup.

    Args:
        quiet: for the processes beside the main one.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = PlainConsole(quiet=quiet)

    def placed(self, folder: Path, asked_for: str | None) -> None:
        """Say where the run is, where that is not the folder that was asked for."""
        if str(folder) != str(Path(asked_for or folder)):
            self.console.print(f"{asked_for} holds another run, this one is in {folder}", soft_wrap=True)

    def begin(self, run: Any, trainer: Any) -> None:
        """What is about to be trained."""
        model = trainer.model
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        self.console.print(
            Text(run.recipe, "bold"),
            f": {run.model.model_name_or_path}, {run.ist.adapter}, {run.ist.method}",
            sep="",
        )
        self.console.print(
            f"{total / 1e6:.1f} M parameters, {trainable / 1e6:.2f} M of them trainable, on {trainer.args.device}"
            + (f", {trainer.args.world_size} processes" if trainer.args.world_size > 1 else "")
        )
        self.console.print(data_line(trainer), soft_wrap=True)
        self.console.print(adapter_line(model, run.ist.adapter, trainer.args), soft_wrap=True)
        if run.selector or run.ist.method == "greedy":
            self._choice(run, model)
        if run.unused:
            self.console.print(
                f"without effect with {run.ist.adapter}, {run.ist.method}: {', '.join(run.unused)}", soft_wrap=True
            )

    def _choice(self, run: Any, model: Any) -> None:
        """What is chosen from, and what trains besides."""
        factory = selector_factory(run.selector or "all")
        layers = layers_to_train(model, run.ist.layers, what_trains(factory), least_layers(factory))
        if run.ist.method == "greedy":
            active = run.ist_config.layer_counts(len(layers)).active
        else:
            active = len(make_selector(factory, run.ist_config, [layer.name for layer in layers]).choose(0))
        whole = "" if layers[0].adapters else "whole "
        self.console.print(f"{active} of {len(layers)} {whole}layers a step, from {layers[0].name}")
        outside = parameters_outside(model, layers)
        if outside:
            count = sum(parameter.numel() for parameter in outside.values())
            self.console.print(
                f"{count} parameters outside of the layers train at every step ({next(iter(outside))}, …)",
                soft_wrap=True,
            )

    def searched(self, search: dict[str, Any]) -> None:
        """What the greedy search found, and at what cost."""
        self.console.print(
            f"greedy search: layers {', '.join(map(str, search['layers']))} after {search['num_trainings']} trainings, "
            f"{search['num_steps']} steps in {search['seconds']:.0f} s",
            soft_wrap=True,
        )

    def focused(self, focus: dict[str, Any]) -> None:
        """Which layers a focused training chose, with which ranks, and what it took to find out."""
        ranks = sorted(set(focus["ranks"].values()))
        size = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "size kept"
        took = f", measured in {focus['seconds']:.0f} s" if focus["scores"] and focus["seconds"] else ""
        chosen = layer_map(tuple(focus["layers"]), len(focus["names"]))
        self.console.print(
            f"focused on {len(focus['layers'])} of {len(focus['names'])} layers {chosen} {size}, "
            f"{focus['num_parameters']:,} of {focus['num_parameters_before']:,} trainable parameters{took}",
            soft_wrap=True,
        )

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say what is being done while it is."""
        with self.console.status(what):
            yield

    def judged(self, when: str, figures: dict[str, float]) -> None:
        """The figures before or after training."""
        if figures:
            self.console.print(f"{when:>6}: " + ", ".join(describe(name, value) for name, value in figures.items()))

    def end(self, result: dict[str, Any], folder: Path, picture: Path | None) -> None:
        """The figures side by side, and where everything is."""
        table = Table(show_edge=False, pad_edge=False)
        for column in ("", "before", "after"):
            table.add_column(column)
        for name, value in result["before"].items():
            table.add_row(label(name), number(name, value), number(name, result["after"][name]))
        self.console.print()
        if result["before"]:
            self.console.print(table)
        self.console.print(
            f"{result['num_steps']} steps in {result['train_seconds']:.0f} s, "
            f"peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB"
        )
        if "fused" in result:
            modules, others = result["fused"]["modules"], result["fused"]["others"]
            parts = [describe_fused(modules, others)] if modules or others else []
            if "focus" not in result:
                parts.append(f"measuring took {result['probe_share']:.1%} of the steps' time")
            if parts:
                self.console.print("; ".join(parts), soft_wrap=True)
        self.console.print(f"{'model' if result['adapter'] == 'none' else 'adapter'}: {folder}", soft_wrap=True)
        if picture:
            self.console.print(f"picture: {picture}", soft_wrap=True)


class TrainingProgress(TrainerCallback):
    """The progress line: the step, the layers that it trains, the loss, the time left."""

    def __init__(self, display: Display, ist: IST | None) -> None:
        self._console = display.console
        self._ist = ist
        self._progress = progress_line(self._console)
        self._task: Any = None
        self._training = False
        self._layers, self._loss = "", "–"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the line."""
        self._training = True
        self._task = self._progress.add_task(
            "", total=state.max_steps, completed=state.global_step, layers="", loss=self._loss
        )
        self._progress.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the layers of this step."""
        tuner = self._ist.tuner if self._ist else None
        if tuner:
            self._layers = layer_map(tuner.active_layers or (), len(tuner.layers))
            self._progress.update(self._task, layers=self._layers)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step."""
        self._progress.update(self._task, completed=state.global_step)
        self._tell(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the losses, of validation on the way too, which `judged` shows before and after."""
        if logs and "eval_loss" in logs and self._training:
            self._console.print(
                f"step {state.global_step:>4}/{state.max_steps} validation loss {logs['eval_loss']:.3f}"
            )
        if logs and "loss" in logs:
            self._loss = f"{logs['loss']:.3f}"
            self._progress.update(self._task, loss=self._loss)
            self._tell(state)
            if not self._console.is_terminal:
                self._console.print(
                    f"step {state.global_step:>4}/{state.max_steps} {self._layers} loss {logs['loss']:.3f}"
                )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the line stand as it is."""
        self._training = False
        self.stop()

    def _tell(self, state: Any) -> None:
        if not self._console.quiet:
            tell_step(StepLine(state.global_step, state.max_steps, self._layers, self._loss))

    def stop(self) -> None:
        """Give the terminal back; also after an exception."""
        self._progress.stop()


def layer_map(active: tuple[int, ...], num_layers: int) -> str:
    """One sign a layer, from the first to the last: filled where it is active."""
    return "".join("■" if index in active else "·" for index in range(num_layers))


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil  # a requirement of accelerate

        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name() -> str:
    """The GPU, or the number of threads that computed on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"


def label(name: str) -> str:
    """The words for a figure."""
    labels = {"loss": "validation loss", "accuracy": "exact match, held-out problems"}
    return labels.get(name, name.replace("_", " ") if name in SHARES else name)


def number(name: str, value: float) -> str:
    """A figure as a reader wants it."""
    return f"{value:.0%}" if name in SHARES else f"{value:.3f}"


def describe(name: str, value: float) -> str:
    """A figure with its name."""
    return f"{label(name)} {number(name, value)}"
