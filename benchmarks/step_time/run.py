"""Time and memory of a training step, one JSON file for a device: python benchmarks/step_time/run.py NAME [--options].

One model stays in memory and every case is run on it in turn, in rounds, so that all share one device at one time.
A case's step is forward, backward and optimizer, and with IST everything of IST: the choice and, once in a round, the
importance loop.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import mean, median
from typing import Any

import peft
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from cases import GROUPS, Case  # noqa: E402

from commit import installed  # noqa: E402
from harness import (  # noqa: E402
    GIB,
    SHAPES,
    Recorder,
    allocated,
    find_device,
    free,
    make_model,
    now,
    peak,
    reset_peak,
    settings,
    shorten,
    token_batches,
)
from ist import SparseTuner  # noqa: E402

INTERVAL = 10
"""Steps between two importance updates, and of one round."""
NUM_BATCHES = 4


@dataclass
class Figures:
    """What was measured of a case, a value for each round."""

    step_ms: list[float] = field(default_factory=list)
    """Mean over a round, importance loop included."""
    probe_ms: list[float] = field(default_factory=list)
    """The importance loop's part of that."""
    activation_gib: list[float] = field(default_factory=list)
    """Allocated after the forward over what was before, mean over a round."""
    peak_gib: list[float] = field(default_factory=list)
    error: str | None = None
    """Why there is no more."""


class Bench:
    """One base model, on which adapters come and go."""

    def __init__(self, size: str, device: str, rows: int, tokens: int, probe_rows: int, layers: int | None) -> None:
        self.device = device
        self.base = make_model(size, device, layers)
        self.batches = token_batches(NUM_BATCHES, rows, tokens, device)
        self.probes = [{name: ids[:probe_rows] for name, ids in self.batches[0].items()}]
        self.model: Any = self.base.requires_grad_(False)
        self._adapter: tuple[Any, ...] | None = None

    def adapt(self, case: Case) -> None:
        """Put a case's adapters on the model, unless they are there."""
        if case.adapter == self._adapter:
            return
        if self._adapter:
            self.base = self.model.unload()
        self._adapter = case.adapter
        if case.floor:
            self.model = self.base.requires_grad_(False)
            return
        self.model = make_lora(self.base, case)

    def round(self, case: Case, steps: int, figures: Figures | None, interval: int | None = None) -> None:
        """Run a case for `steps` steps, the last of which is followed by an importance update unless `interval` is
        another number than that.
        """
        self.adapt(case)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        fused = True if self.device == "cuda" else None
        optimizer = None if case.floor else torch.optim.AdamW(trainable, lr=1e-5, fused=fused)
        tuner = None
        if case.options is not None:
            probes = self.batches[:1] if case.whole_probes else self.probes
            probes = [{name: ids[:, : case.probe_tokens] for name, ids in batch.items()} for batch in probes]
            tuner = SparseTuner(self.model, probe_batches=probes, update_interval=interval or steps, **case.options)
        try:
            # The first update of a training compares two ways to measure; the others do not pay for that.
            if tuner and case.measures:
                tuner._measure(first_sets(len(tuner.layers)))
            measured = tuner.probe_seconds if tuner else 0.0
            held, start = [], now(self.device)
            reset_peak(self.device)
            for step in range(steps):
                held.append(self.floor_step(step) if case.floor else self.step(case, optimizer, tuner, step))
            elapsed = now(self.device) - start
        finally:
            if tuner:
                tuner.close()
            self.model.zero_grad(set_to_none=True)
        if figures is not None:
            figures.step_ms.append(elapsed / steps * 1e3)
            figures.probe_ms.append(((tuner.probe_seconds if tuner else 0.0) - measured) / steps * 1e3)
            figures.activation_gib.append(mean(held) / GIB)
            figures.peak_gib.append(peak(self.device) / GIB)

    def step(self, case: Case, optimizer: Any, tuner: SparseTuner | None, step: int) -> int:
        """One optimizer step; returns the bytes held after the forward."""
        if tuner:
            tuner.begin_step()
        before = allocated(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=case.precision == "autocast"):
            loss = self.model(**self.batches[step % NUM_BATCHES], use_cache=False).loss
        held = allocated(self.device) - before
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if tuner:
            tuner.end_step(optimizer)
        return held

    def floor_step(self, step: int) -> int:
        """Forward and backward of the base model, to the embeddings."""
        with asking_for_gradients(self.base):
            before = allocated(self.device)
            loss = self.model(**self.batches[step % NUM_BATCHES], use_cache=False).loss
            held = allocated(self.device) - before
            loss.backward()
        return held


def first_sets(num_layers: int) -> list[tuple[int, ...]]:
    """Three sets of half of the layers."""
    half = num_layers // 2
    return [tuple(range(start, start + half)) for start in (0, num_layers // 4, num_layers - half)]


def make_lora(base: Any, case: Case) -> Any:
    """The model with LoRA that has begun to learn: its up-projections are not zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=round(32 / case.kept),
        lora_alpha=64 / case.kept**0.5,
        lora_dropout=case.dropout,
        target_modules=list(case.modules),
        layers_to_transform=kept_layers(base.config.num_hidden_layers, case.kept, case.above),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=case.precision != "bfloat16").train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=1e-3)
    return model


def kept_layers(num_layers: int, kept: float, above: float = 0.0) -> list[int] | None:
    """The first layer of each equal part of the depth, or of what is above its lowest part; None for all layers."""
    num, lowest = max(1, round(kept * num_layers)), round(above * num_layers)
    if num == num_layers:
        return None
    return [lowest + part * (num_layers - lowest) // num for part in range(num)]


@contextmanager
def asking_for_gradients(base: Any) -> Iterator[None]:
    """Within the context the backward goes down to the embeddings' output."""

    def ask(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.requires_grad_()

    handle = base.get_input_embeddings().register_forward_hook(ask)
    try:
        yield
    finally:
        handle.remove()


def use_liger(base: nn.Module) -> None:
    """Put Liger's kernels into the model, for good."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama  # pyright: ignore[reportMissingImports]

    apply_liger_kernel_to_llama(model=base)  # type: ignore[arg-type]


def compile_layers(base: Any) -> None:
    """Compile each layer by itself, for good."""
    for layer in base.model.layers:
        layer.compile()


def prepare(base: nn.Module, case: Case, done: set[str]) -> None:
    """Change the model for good, where a group needs it and it has not been done."""
    if case.liger and "liger" not in done:
        use_liger(base)
        done.add("liger")
    if case.compiled and "compiled" not in done:
        compile_layers(base)
        done.add("compiled")


def alike(cases: Iterable[Case]) -> list[tuple[Case, ...]]:
    """The cases that can be run in turn, on one model as it is: those beside each other with the same kernels."""
    return [tuple(same) for _, same in groupby(cases, key=lambda case: (case.liger, case.compiled))]


def measure(bench: Bench, cases: tuple[Case, ...], options: Any, recorder: Recorder) -> None:
    """Run cases in turn, so that what changes on the host meets all of them; compiled ones one after the other, since
    their graphs share one table.
    """
    compiled = cases[0].compiled
    for turn in [(case,) for case in cases] if compiled else [cases]:
        figures = {case.name: Figures() for case in turn}
        if compiled:
            torch._dynamo.reset()
        for number in range(-1 if compiled else 0, options.rounds + 1):  # Up to 0 they warm up; graphs take longer.
            if number > 1 and time.perf_counter() > options.end:
                break
            steps = INTERVAL if number > 0 or compiled else options.warm_steps
            for case in turn:
                own = figures[case.name]
                if own.error is None:
                    run_round(bench, case, steps, own, number > 0)
                    recorder.result["rows"][case.name] = {"case": asdict(case), **asdict(own)}
                    recorder.write()
        for name, own in figures.items():
            show(name, own)


def run_round(bench: Bench, case: Case, steps: int, figures: Figures, counts: bool) -> None:
    """A round, or the reason that there is none."""
    try:
        with case.constants():
            bench.round(case, steps, figures if counts else None)
    except Exception as error:
        figures.error = shorten(error)
        print(case.name, traceback.format_exc(limit=-4), flush=True)
    if figures.error:
        free(bench.device)


def show(name: str, figures: Figures) -> None:
    if figures.step_ms:
        step, held = median(figures.step_ms), median(figures.activation_gib)
        print(f"{name}: {step:.1f} ms, of it probes {median(figures.probe_ms):.1f}; {held:.2f} GiB", flush=True)


def main() -> None:
    """Measure, writing `FOLDER/NAME.json` after each round of each case."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--size", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--probe-rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="0 only warms up, and fills the compiler's cache")
    parser.add_argument("--warm-steps", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1e9, help="after which cases do one round alone")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["plain", "seven", "liger", "seven-liger"])
    parser.add_argument("--folder", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if any(name.startswith("compiled") for name in options.groups) and "liger" in " ".join(options.groups):
        raise SystemExit("compiled and liger change the model for good: measure them in two runs.")
    recorder = Recorder(options.folder, options.name, settings(options), "step_time")
    options.end = start + options.seconds
    with recorder.finished() as result:
        bench = Bench(options.size, find_device(), options.rows, options.tokens, options.probe_rows, options.layers)
        result["weights_gib"] = sum(p.numel() * p.element_size() for p in bench.base.parameters()) / GIB
        done: set[str] = set()
        for cases in alike(case for name in GROUPS if name in options.groups for case in GROUPS[name]):
            try:
                prepare(bench.base, cases[0], done)
            except Exception as error:
                print(shorten(error), flush=True)
                result["rows"].update({case.name: {"error": shorten(error)} for case in cases})
                continue
            if "liger" in done:
                result["versions"]["liger-kernel"] = installed("liger-kernel")
            measure(bench, cases, options, recorder)


if __name__ == "__main__":
    main()
