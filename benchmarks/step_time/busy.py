"""How long the GPU is busy in a step, and with what: python benchmarks/step_time/busy.py NAME [--options].

Where the busy time is well below the step's, the host that launches the kernels is what a step waits for.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from cases import GROUPS, Case  # noqa: E402
from run import Bench, Figures, prepare  # noqa: E402

from harness import SHAPES, Recorder, find_device, settings, shorten  # noqa: E402

CASES = {case.name: case for cases in GROUPS.values() for case in cases}


def busy(bench: Bench, case: Case, steps: int, top: int) -> dict[str, Any]:
    """Milliseconds of a step without profiler, and of the GPU's work in it, without the importance loop."""
    found = Figures()
    bench.round(case, steps, None, interval=10**6)
    bench.round(case, steps, found, interval=10**6)
    kind = ProfilerActivity.CUDA if bench.device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiled:
        bench.round(case, steps, None, interval=10**6)
    events = [event for event in profiled.key_averages() if event.device_type != DeviceType.CPU]
    events.sort(key=lambda event: -event.self_device_time_total)
    return {
        "step_ms": found.step_ms[0],
        "busy_ms": sum(event.self_device_time_total for event in events) / steps / 1e3,
        "kernels": sum(event.count for event in events) / steps,
        "top": {event.key[:100]: event.self_device_time_total / steps / 1e3 for event in events[:top]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--size", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--probe-rows", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--top", type=int, default=12)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["floor", "IST", "IST, Liger"])
    parser.add_argument("--folder", type=Path, default=HERE / "results")
    options = parser.parse_args()
    recorder = Recorder(options.folder, options.name, settings(options), "busy")
    with recorder.finished() as result:
        bench = Bench(options.size, find_device(), options.rows, options.tokens, options.probe_rows, options.layers)
        done: set[str] = set()
        for name in options.cases:
            try:
                prepare(bench.base, CASES[name], done)
                with CASES[name].constants():
                    result["rows"][name] = busy(bench, CASES[name], options.steps, options.top)
            except Exception as error:
                result["rows"][name] = {"error": shorten(error)}
            print(name, {key: value for key, value in result["rows"][name].items() if key != "top"}, flush=True)
            recorder.write()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
