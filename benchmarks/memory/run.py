"""What a training step holds in memory, by model and method: python benchmarks/memory/run.py NAME [--options].

Table 1 of the paper: one row of tokens, bfloat16 weights, AdamW, no checkpointing, attention that keeps its scores
(`eager`) and that does not (`sdpa`). Counted by the allocator of this process, so that several processes can share a
GPU: `--after NAME` waits for the end of others that write to the same folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from harness import (  # noqa: E402
    FIVE,
    GIB,
    GPT2_SHAPES,
    SHAPES,
    Recorder,
    allocated,
    find_device,
    free,
    make_model,
    model_config,
    peak,
    reset_peak,
    settings,
    shorten,
    token_batches,
)
from ist import BottleneckConfig, SparseTuner  # noqa: E402

ATTENTIONS = ("eager", "sdpa")
GPT2_MODULES = ("c_attn", "c_fc", "mlp.c_proj")
PATIENCE = 300
"""Seconds to wait for another process."""
HOPELESS = 1.2
"""What needs more than so many times the card for weights, gradients and moments alone is not tried."""


@dataclass(frozen=True)
class Method:
    """A row of the table; `ist` holds the options of a tuner, None is training without one."""

    adapter: str | None
    ist: dict[str, Any] | None = None


METHODS: dict[str, Method] = {
    "Series": Method("series"),
    "Series + IST": Method("series", {}),
    "Parallel": Method("parallel"),
    "Parallel + IST": Method("parallel", {}),
    "LoRA": Method("lora"),
    "LoRA + IST, PEFT's forward": Method("lora", {"fused": False}),
    "LoRA + IST": Method("lora", {}),
    "LoRA + IST, frozen layers recomputed": Method("lora", {"recompute": "frozen"}),
    "Full": Method(None),
}
"""Those of one adapter stand together: it is put on once. Full fine-tuning comes last: it needs the most, and it moves
the weights. It has no layers to choose from, so the paper has no row of it with IST."""


def adapter_config(adapter: str, size: str) -> Any:
    """The paper's settings: LoRA of rank 32 on attention and MLP, bottlenecks of width 256 in the MLP."""
    if adapter != "lora":
        return BottleneckConfig(mode=adapter, bottleneck_size=256)  # type: ignore[arg-type]
    import peft

    gpt2 = size in GPT2_SHAPES
    return peft.LoraConfig(
        r=32,
        lora_alpha=64,
        lora_dropout=0.05,
        target_modules=list(GPT2_MODULES if gpt2 else FIVE),
        fan_in_fan_out=gpt2,
    )


@contextmanager
def adapted(base: nn.Module, adapter: str | None, size: str) -> Iterator[Any]:
    """Within the context the model has adapters, or trains in full; afterwards it is the bare one."""
    if adapter is None:
        try:
            yield base.requires_grad_(True).train()
        finally:
            base.requires_grad_(False)
            base.zero_grad(set_to_none=True)
        return
    import peft

    model: Any = peft.get_peft_model(base, adapter_config(adapter, size))  # type: ignore[arg-type]
    try:
        yield model.train()
    finally:
        model.unload()


def num_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of tensors, of which some may be None."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def moment_bytes(optimizer: Any) -> int:
    """Bytes of an optimizer's state."""
    return num_bytes(value for state in optimizer.state.values() for value in state.values())


def make_moments(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Moments of all layers, as there are after many steps of changing sets."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(model: Any, method: Method, batch: dict[str, Any], steps: int, device: str) -> dict[str, Any]:
    """Bytes in each step after the first: what is held by the end of the forward and of the backward, and the peak."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-6, weight_decay=0.0, fused=device == "cuda" or None)
    tuner = None
    if method.ist is not None:
        tuner = SparseTuner(model, probe_batches=[batch], update_interval=steps, **method.ist)
        make_moments(optimizer, trainable)
    seen = []
    try:
        for _ in range(steps):
            if tuner:
                tuner.begin_step()
            reset_peak(device)
            seen.append(one_step(model, optimizer, trainable, batch, device))
        reset_peak(device)
        if tuner:
            tuner.end_step(optimizer)
    finally:
        if tuner:
            tuner.close()
        optimizer.zero_grad(set_to_none=True)
    return {
        "weights": num_bytes([*model.parameters(), *model.buffers()]),
        "trainable": num_bytes(trainable),
        "trainable_dtype": str(trainable[0].dtype).removeprefix("torch."),
        "probe_peak": peak(device) if tuner else 0,
        "steps": seen[1:],
    }


def one_step(
    model: Any, optimizer: Any, trainable: Sequence[nn.Parameter], batch: dict[str, Any], device: str
) -> dict[str, int]:
    """One optimizer step and what it holds."""
    before = allocated(device)
    loss = model(**batch, use_cache=False).loss
    activations = allocated(device) - before
    loss.backward()
    gradients = num_bytes(parameter.grad for parameter in trainable)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        "activations": activations,
        "gradients": gradients,
        "moments": moment_bytes(optimizer),
        "peak": peak(device),
    }


def full_bytes(size: str) -> int:
    """Weights, gradients and AdamW's two moments of full fine-tuning in bfloat16."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(size))
    return 4 * 2 * sum(parameter.numel() for parameter in model.parameters())


def hopeless(size: str, method: Method, device: str) -> str | None:
    """Why a method is not tried on this device, or None."""
    if method.adapter is not None or device == "cpu":
        return None
    needed, there = full_bytes(size), torch.cuda.mem_get_info()[1]
    if needed <= HOPELESS * there:
        return None
    return f"does not fit: {needed / GIB:.0f} GiB needed for weights, gradients and moments alone"


def run_model(size: str, methods: dict[str, Method], options: Any, recorder: Recorder) -> None:
    """All cells of one model; what fails is recorded, and the rest goes on."""
    rows, device = recorder.result["rows"], find_device()
    refused = {name: hopeless(size, method, device) for name, method in methods.items()}
    for name, reason in refused.items():
        if reason:
            for attention in options.attentions:
                rows[f"{size} | {name} | {attention}"] = {"error": reason}
    methods = {name: method for name, method in methods.items() if not refused[name]}
    recorder.write()
    if not methods:
        return
    base = make_model(size, device)
    batch = token_batches(1, 1, options.tokens, device)[0]
    for adapter in dict.fromkeys(method.adapter for method in methods.values()):
        own = {name: method for name, method in methods.items() if method.adapter == adapter}
        try:
            with adapted(base, adapter, size) as model:
                for name, method in own.items():
                    for attention in options.attentions:
                        base.set_attn_implementation(attention)
                        rows[f"{size} | {name} | {attention}"] = cell(model, method, batch, options.steps, device)
                        recorder.write()
                        show(f"{size} | {name} | {attention}", rows)
        except Exception as error:  # an adapter that could not be put on
            for name in own:
                for attention in options.attentions:
                    rows.setdefault(f"{size} | {name} | {attention}", {"error": shorten(error)})
            recorder.write()


def cell(model: Any, method: Method, batch: dict[str, Any], steps: int, device: str) -> dict[str, Any]:
    """What was measured, or the error."""
    start = time.perf_counter()
    found: dict[str, Any]
    try:
        found = measure(model, method, batch, steps, device)
    except Exception as error:
        found = {"error": shorten(error)}
    model.zero_grad(set_to_none=True)
    free(device)
    return {**found, "seconds": round(time.perf_counter() - start, 2)}


def show(name: str, rows: dict[str, Any]) -> None:
    row = rows[name]
    figure = row.get("error") or f"{max(step['peak'] for step in row['steps']) / GIB:.2f} GiB"
    print(f"{name}: {figure}, {row['seconds']} s", flush=True)


def wait_for(names: Sequence[str], folder: Path, patience: float) -> None:
    """Until other processes have written their last word, or for so many seconds."""
    end = time.monotonic() + patience
    while time.monotonic() < end and not all(has_finished(folder / f"{name}.json") for name in names):
        time.sleep(0.2)


def has_finished(file: Path) -> bool:
    return file.exists() and bool(json.loads(file.read_text(encoding="utf-8")).get("finished"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    sizes = [*GPT2_SHAPES, *SHAPES]
    parser.add_argument("--models", nargs="+", choices=sizes, default=["gpt2", "tinyllama", "7b", "13b"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--no-full", action="store_true", help="leave full fine-tuning out")
    parser.add_argument("--full-last", action="store_true", help="full fine-tuning after all else of all models")
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=[*ATTENTIONS])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4, help="of each cell; the first is not counted")
    parser.add_argument("--after", nargs="+", default=[], metavar="NAME", help="wait for these results")
    parser.add_argument("--folder", type=Path, default=HERE / "results")
    options = parser.parse_args()
    chosen = {name: METHODS[name] for name in METHODS if name in options.methods}
    light = {name: method for name, method in chosen.items() if method.adapter is not None}
    full = {} if options.no_full else {name: chosen[name] for name in chosen if name not in light}
    turns = [light, full] if options.full_last or options.no_full else [light | full]
    recorder = Recorder(options.folder, options.name, settings(options), "memory")
    recorder.result["card_bytes"] = torch.cuda.mem_get_info()[1] if find_device() == "cuda" else 0
    with recorder.finished():
        wait_for(options.after, options.folder, PATIENCE)
        for methods in turns:
            for size in options.models if methods else ():
                try:
                    run_model(size, methods, options, recorder)
                except Exception as error:
                    print(size, shorten(error), flush=True)
                    recorder.result["rows"].setdefault(f"{size} | {next(iter(methods))} | –", {"error": shorten(error)})
                free(find_device())


if __name__ == "__main__":
    main()
