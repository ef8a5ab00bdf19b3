"""Time of the products of an adapter, as the library has them and by PyTorch: python products.py NAME [--options].

Which way serves at which rank (`ist.step.fused.launch`) rests on these figures. `earlier` has those of when the library
computed all of them in kernels of its own. Each product is computed in turn on
several tensors, so that none is in the GPU's cache from the time before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import linear

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from harness import Recorder, settings, shorten  # noqa: E402
from ist.step.fused import launch  # noqa: E402
from ist.step.fused.precision import Plain, Split  # noqa: E402

SIZES = {"4096 to 4096": (4096, 4096), "4096 to 11008": (4096, 11008), "11008 to 4096": (11008, 4096)}
"""Inputs and outputs of the modules of LLaMA-7B."""
COPIES = 3


class Tensors:
    """What a module of one size has, once for each of the copies."""

    def __init__(self, inputs: int, outputs: int, rows: int, rank: int, float32: bool) -> None:
        own = torch.float32 if float32 else torch.bfloat16
        self.a = torch.randn(rank, inputs, device="cuda").mul_(0.01).to(own)
        self.b = torch.randn(outputs, rank, device="cuda").mul_(0.01).to(own)
        self.weight = torch.randn(outputs, inputs, device="cuda").mul_(0.01).bfloat16()
        self.x = [torch.randn(rows, inputs, device="cuda").bfloat16() for _ in range(COPIES)]
        self.y = [torch.randn(rows, outputs, device="cuda").bfloat16() for _ in range(COPIES)]


def calls(kind: Any, own: Tensors) -> dict[str, Callable[[int], Any]]:
    """Each product, of the copy with a number."""
    h = kind.down(own.x[0], own.a, 0.0)[0]
    found: dict[str, Callable[[int], Any]] = {
        "down": lambda i: kind.down(own.x[i], own.a, 0.0),
        "up": lambda i: kind.add_up_(own.y[i], h, own.b, 1.0),
        "base and up": lambda i: kind.output(own.x[i], own.weight, None, h, own.b, 1.0),
        "grad_of_h": lambda i: kind.grad_of_h(own.y[i], own.b),
        "grad_of_b": lambda i: kind.grad_of_b(own.y[i], h, 1.0),
        "grad_of_a": lambda i: kind.grad_of_a(h, own.x[i], None, 1.0),
        "base and grad_of_x": lambda i: kind.input_grad(own.y[i], own.weight, h, own.a, None, 0.0, 1.0),
    }
    if isinstance(kind, launch.Kernels):
        found |= {"base": lambda i: linear(own.x[i], own.weight), "up, base on top": lambda i: on_top(kind, own, h, i)}
    return found


def on_top(kind: Any, own: Tensors, h: torch.Tensor, copy: int) -> torch.Tensor:
    """As `base and up`, the adapter's product first."""
    y = torch.empty_like(own.y[copy])
    kind._up_(y, h, own.b.t(), 1.0, None, False)
    return y.addmm_(own.x[copy], own.weight.t())


def microseconds(call: Callable[[int], Any], repeats: int) -> float:
    """The median of a call's time on the GPU."""
    for copy in range(COPIES):
        call(copy)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]  # So that the host is ahead of the GPU.
    for number, (begin, end) in enumerate(events):
        begin.record()
        call(number % COPIES)
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) * 1e3 for begin, end in events)


def ways(float32: bool) -> dict[str, Any]:
    own = torch.float32 if float32 else torch.bfloat16
    kernels = launch.make_kernels(None, torch.bfloat16, float32, own)
    plain = Split() if float32 else Plain(None, own, own)
    return {"the library": kernels, "PyTorch": plain}


def main() -> None:
    """Measure, writing `FOLDER/NAME.json` after each size and rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=HERE / "results")
    options = parser.parse_args()
    recorder = Recorder(options.folder, options.name, settings(options), "products")
    with recorder.finished() as result:
        for precision in options.precisions:
            for size in options.sizes:
                for rank in options.ranks:
                    own = Tensors(*SIZES[size], options.rows, rank, precision == "float32")
                    found: dict[str, dict[str, Any]] = {}
                    for way, kind in ways(precision == "float32").items():
                        for name, call in calls(kind, own).items():
                            try:
                                found.setdefault(name, {})[way] = microseconds(call, options.repeats)
                            except Exception as error:
                                found.setdefault(name, {})[way] = shorten(error)
                    result["rows"][f"{precision} adapters, {size}, rank {rank}"] = found
                    recorder.write()
                    print(precision, size, rank, found, flush=True)


if __name__ == "__main__":
    main()
