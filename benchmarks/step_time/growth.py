"""How the cost of a step grows with tokens, layers and rows, and what the library itself does in a step.

python benchmarks/step_time/growth.py NAME [--options]

A narrow model of many layers. The library's own work (the choice, the toggling, the history) is the host's time in
`begin_step` and `end_step`; the importance loop's forwards are no part of it and are shown by run.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from cases import Case  # noqa: E402
from run import first_sets, make_lora  # noqa: E402

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
from ist.runs.history import HISTORY_FILE, History  # noqa: E402

TOKENS, LAYERS, ROWS = (256, 512, 1024, 2048, 4096), (8, 16, 32, 48, 80), (1, 2, 4, 8, 16)
METHODS: dict[str, dict[str, Any] | None] = {"LoRA": None, "IST": {}}


def points(sweeps: dict[str, list[int]], middle: dict[str, int]) -> list[dict[str, int]]:
    """Every setting once, those with equal numbers of layers together; `middle` holds while one thing grows."""
    found = {tuple({**middle, name: value}.items()) for name, values in sweeps.items() for value in values}
    return sorted((dict(point) for point in found), key=lambda point: (point["layers"], point["rows"], point["tokens"]))


def step_ms(model: Any, options: dict[str, Any] | None, point: dict[str, int], steps: int, device: str) -> float:
    """Mean milliseconds of a step, with one importance update (a probe of one row) in `steps`."""
    batch = token_batches(1, point["rows"], point["tokens"], device)[0]
    probe = {name: ids[:1] for name, ids in batch.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=device == "cuda")
    tuner = None if options is None else SparseTuner(model, probe_batches=[probe], update_interval=steps, **options)

    def step() -> None:
        if tuner:
            tuner.begin_step()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if tuner:
            tuner.end_step(optimizer)

    try:
        if tuner:  # The first update compares two ways to measure, and is no part of what the others cost.
            tuner._measure(first_sets(len(tuner.layers)))
        for _ in range(2):
            step()
        reset_peak(device)
        start = now(device)
        for _ in range(steps):
            step()
        return (now(device) - start) / steps * 1e3
    finally:
        if tuner:
            tuner.close()
        model.zero_grad(set_to_none=True)


def own_work(model: Any, device: str, steps: int, forward: bool) -> dict[str, float]:
    """Milliseconds of host time in `begin_step` and `end_step`, without and with the learning of an update.

    Args:
        model: with adapters.
        device: its device.
        steps: how many are timed; the median counts.
        forward: whether each step also trains, so that there are gradients and moments as there are in earnest.
    """
    batch = token_batches(1, 1, 64, device)[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=device == "cuda")
    found: dict[str, list[float]] = {"begin_step": [], "end_step": [], "step": [], "update": []}
    with tempfile.TemporaryDirectory() as folder:
        tuner = SparseTuner(
            model,
            probe_batches=[batch],
            update_interval=10,
            loss_function=lambda model, batch: torch.ones(()),  # The candidate sets are toggled, but nothing computed.
            history=History(Path(folder) / HISTORY_FILE),
        )
        with tuner:
            for number in range(1, steps + 1):
                start = time.perf_counter()
                tuner.begin_step()
                middle = time.perf_counter()
                if forward:
                    model(**batch, use_cache=False).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                late = time.perf_counter()
                tuner.end_step(optimizer)
                begun, ended = (middle - start) * 1e3, (time.perf_counter() - late) * 1e3
                if number % 10 == 0:
                    found["update"].append(ended)
                else:
                    found["begin_step"].append(begun)
                    found["end_step"].append(ended)
                    found["step"].append(begun + ended)
    return {f"{name}_ms": median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--size", choices=SHAPES, default="narrow")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--layers", type=int, nargs="*", default=LAYERS)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--middle", type=int, nargs=3, default=(1024, 32, 1), metavar=("TOKENS", "LAYERS", "ROWS"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--own-layers", type=int, default=80)
    parser.add_argument("--own-steps", type=int, default=60)
    parser.add_argument("--no-forward", action="store_true", help="time the library's own work without any training")
    parser.add_argument("--folder", type=Path, default=HERE / "results")
    options = parser.parse_args()
    device = find_device()
    recorder = Recorder(options.folder, options.name, settings(options), "growth")
    with recorder.finished() as result:
        result["rows"] = rows = []
        model, layers = None, 0
        sweeps = {"tokens": options.tokens, "layers": options.layers, "rows": options.rows}
        for point in points(sweeps, dict(zip(sweeps, options.middle, strict=True))):
            if point["layers"] != layers:
                model, layers = None, point["layers"]
                free(device)
                model = make_lora(make_model(options.size, device, layers), Case("LoRA"))
            row: dict[str, Any] = dict(point)
            for name, given in METHODS.items():
                try:
                    row[name] = {"step_ms": step_ms(model, given, point, options.steps, device)}
                    row[name]["peak_gib"] = peak(device) / GIB
                except Exception as error:
                    row[name] = {"error": shorten(error)}
            print(row, flush=True)
            rows.append(row)
            recorder.write()
        if layers != options.own_layers:
            model = None
            free(device)
            model = make_lora(make_model(options.size, device, options.own_layers), Case("LoRA"))
        work = own_work(model, device, options.own_steps, not options.no_forward)
        result["own_work"] = {"layers": options.own_layers, **work}
        print(result["own_work"], flush=True)


if __name__ == "__main__":
    main()
