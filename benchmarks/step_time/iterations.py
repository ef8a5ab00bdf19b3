"""Forward, backward and whole iterations, as table 13 of the paper: python benchmarks/step_time/iterations.py NAME.

LoRA on all layers, LISA with two layers (which trains these layers themselves), LoRA with IST. Forward and backward
are timed on the device; the time of all steps holds everything else too: the optimizer, the choice, the importance
loop.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from cases import Case  # noqa: E402
from run import make_lora  # noqa: E402

from harness import (  # noqa: E402
    GIB,
    SHAPES,
    Recorder,
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


@dataclass(frozen=True)
class Method:
    """A column of the table: with LoRA or without, and what the tuner is told; None is no tuner."""

    lora: bool
    options: dict[str, Any] | None = None


METHODS: dict[str, Method] = {
    "LoRA": Method(lora=True),
    "LoRA + IST": Method(lora=True, options={}),
    "LoRA + IST, PEFT's forward": Method(lora=True, options={"fused": False}),
    "LISA": Method(lora=False, options={"selector": "lisa", "num_active_layers": 2, "optimizer_state": "reset"}),
}
"""LISA comes last: it moves the weights."""


class Clock:
    """Marks points in the device's time without stopping it."""

    def __init__(self, device: str) -> None:
        self._device = device

    def mark(self) -> Any:
        """A point in time: of the GPU's work, where there is one."""
        if self._device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, begin: Any, end: Any) -> float:
        """Between two points, when the device has passed them."""
        return begin.elapsed_time(end) if self._device == "cuda" else (end - begin) * 1e3


def measure(
    model: Any, method: Method, batches: list[Any], probes: list[Any], warm: int, steps: int, device: str
) -> dict[str, Any]:
    """Mean milliseconds of forward and backward, and the seconds of all `steps`."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-6, fused=True if device == "cuda" else None)
    tuner = None if method.options is None else SparseTuner(model, probe_batches=probes, **method.options)
    clock = Clock(device)
    marks: list[tuple[Any, Any, Any]] = []
    begin, probe_seconds = now(device), 0.0
    try:
        for step in range(warm + steps):
            if step == warm:
                begin, probe_seconds = now(device), tuner.probe_seconds if tuner else 0.0
                reset_peak(device)
                marks.clear()
            if tuner:
                tuner.begin_step()
            start = clock.mark()
            loss = model(**batches[step % len(batches)], use_cache=False).loss
            middle = clock.mark()
            loss.backward()
            marks.append((start, middle, clock.mark()))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if tuner:
                tuner.end_step(optimizer)
        seconds = now(device) - begin
    finally:
        if tuner:
            tuner.close()
        model.zero_grad(set_to_none=True)
    return {
        "steps": steps,
        "forward_ms": mean(clock.milliseconds(start, middle) for start, middle, _ in marks),
        "backward_ms": mean(clock.milliseconds(middle, end) for _, middle, end in marks),
        "seconds": seconds,
        "probe_seconds": tuner.probe_seconds - probe_seconds if tuner else 0.0,
        "peak_gib": peak(device) / GIB,
    }


def adapt(base: Any, model: Any, lora: bool) -> Any:
    """The model with LoRA, or itself with all of its weights in training."""
    if not lora:
        bare = model.unload() if model is not base else base
        return bare.requires_grad_(True).train()
    return model if model is not base else make_lora(base, Case("LoRA"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--size", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--shapes", nargs="+", default=["1x1024", "16x256"], help="rows x tokens")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 40], help="for each of the shapes")
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--probe-rows", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=HERE / "results")
    options = parser.parse_args()
    device = find_device()
    recorder = Recorder(options.folder, options.name, settings(options), "iterations")
    with recorder.finished() as result:
        base = model = make_model(options.size, device, options.layers).requires_grad_(False)
        for name in (name for name in METHODS if name in options.methods):
            method = METHODS[name]
            for shape, steps in zip(options.shapes, options.steps, strict=True):
                rows, tokens = map(int, shape.split("x"))
                batches = token_batches(4, rows, tokens, device)
                probes = [{key: ids[: options.probe_rows] for key, ids in batches[0].items()}]
                try:
                    model = adapt(base, model, method.lora)
                    row = measure(model, method, batches, probes, options.warm, steps, device)
                except Exception as error:
                    row = {"error": shorten(error)}
                result["rows"][f"{shape} | {name}"] = {"method": asdict(method), **row}
                print(shape, name, row, flush=True)
                recorder.write()
                free(device)


if __name__ == "__main__":
    main()
