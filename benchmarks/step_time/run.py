"""Time and memory of a training step, one JSON file for a device: python benchmarks/step_time/run.py NAME [--options].

One model stays in memory and every case is run on it in turn, in rounds, so that all share one device at one time.
A case's step is forward, backward and optimizer, and with IST everything of IST: the choice and, spread over the steps
between two, the importance loop.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

from commit import commit  # noqa: E402

import ist  # noqa: E402
from ist import SparseTuner  # noqa: E402

HERE = Path(__file__).parent
FIVE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 8, "num_attention_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
INTERVAL = 10
"""Steps between two importance updates, and of one round."""


@dataclass(frozen=True)
class Case:
    """What is run: `options` None is PEFT alone, otherwise they are IST's."""

    name: str
    options: dict[str, Any] | None = None
    modules: tuple[str, ...] = FIVE
    dropout: float = 0.05
    liger: bool = False
    compiled: bool = False
    precision: str = "float32"
    """Of the adapters: `float32`, which PEFT makes them; `autocast`, the same under autocast, as the Trainer trains
    them with bf16=True; `bfloat16`, as PEFT makes them with autocast_adapter_dtype=False."""
    floor: bool = False
    """The base model alone: forward, and backward to the embeddings."""


PLAIN = (
    Case("floor", floor=True),
    Case("LoRA"),
    Case("IST, PEFT's forward", {"fused": False}),
    Case("IST", {}),
    Case("IST, frozen layers recomputed", {"recompute": "frozen"}),
)
AUTOCAST = (
    Case("LoRA, autocast", precision="autocast"),
    Case("IST, autocast", {}, precision="autocast"),
)
BFLOAT16 = (
    Case("LoRA, bfloat16 adapters", precision="bfloat16"),
    Case("IST, bfloat16 adapters", {}, precision="bfloat16"),
)
LIGER = (
    Case("floor, Liger", floor=True, liger=True),
    Case("LoRA, Liger", liger=True),
    Case("IST, Liger", {}, liger=True),
    Case("IST, Liger, frozen layers recomputed", {"recompute": "frozen"}, liger=True),
)
SEVEN_PLAIN = (Case("LoRA, seven modules, no dropout", modules=SEVEN, dropout=0.0),)
SEVEN_LIGER = (Case("IST, Liger, seven modules, no dropout", {}, modules=SEVEN, dropout=0.0, liger=True),)
COMPILED = (
    Case("floor, compiled by layer", floor=True, compiled=True),
    Case("LoRA, compiled by layer", compiled=True),
    Case("IST, compiled by layer", {}, compiled=True),
    Case("IST, bfloat16 adapters, compiled by layer", {}, compiled=True, precision="bfloat16"),
)
GROUPS: dict[str, tuple[Case, ...]] = {
    "plain": PLAIN,
    "autocast": AUTOCAST,
    "bfloat16": BFLOAT16,
    "compiled": COMPILED,
    "seven": SEVEN_PLAIN,
    "liger": LIGER,
    "seven-liger": SEVEN_LIGER,
}


@dataclass
class Figures:
    """What was measured of a case."""

    step_ms: list[float] = field(default_factory=list)
    """Mean over a round, importance loop included."""
    probe_ms: list[float] = field(default_factory=list)
    """The importance loop's part of that."""
    activation_gib: list[float] = field(default_factory=list)
    """Allocated after the forward over what was before, mean over a round."""
    peak_gib: list[float] = field(default_factory=list)


class Bench:
    """One base model, on which adapters come and go."""

    def __init__(self, size: str, device: str, rows: int, tokens: int, probe_rows: int) -> None:
        self.device = device
        self.base = make_model(size, device)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, (64, tokens), generator=generator).to(device)
        self.batches = [{"input_ids": (part := ids[i * rows :][:rows]), "labels": part} for i in range(64 // rows)]
        self.probes = [{"input_ids": (part := ids[:probe_rows]), "labels": part}]
        self.model: Any = None
        self._adapter: tuple[Any, ...] | None = ()

    def adapt(self, case: Case) -> None:
        """Put a case's adapters on the model, unless they are there."""
        key = None if case.floor else (case.modules, case.dropout, case.precision == "bfloat16")
        if key == self._adapter:
            return
        if self._adapter:
            self.base = self.model.unload()
        self._adapter = key
        if case.floor:
            self.model = self.base.requires_grad_(False)
            return
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=32,
            lora_alpha=64,
            lora_dropout=case.dropout,
            target_modules=list(case.modules),
            task_type="CAUSAL_LM",
        )
        self.model = peft.get_peft_model(self.base, config, autocast_adapter_dtype=case.precision != "bfloat16")
        self.model.train()
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=1e-3)

    def round(self, case: Case, steps: int, figures: Figures | None) -> None:
        """Run a case for `steps` steps."""
        self.adapt(case)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        fused = self.device == "cuda"
        optimizer = None if case.floor else torch.optim.AdamW(trainable, lr=1e-5, fused=fused)
        tuner = None
        if case.options is not None:
            tuner = SparseTuner(self.model, probe_batches=self.probes, update_interval=INTERVAL, **case.options)
        held, start = [], self.now()
        reset_peak(self.device)
        for step in range(steps):
            held.append(self.floor_step(step) if case.floor else self.step(case, optimizer, tuner, step))
        elapsed = self.now() - start
        if figures is not None:
            figures.step_ms.append(elapsed / steps * 1e3)
            figures.probe_ms.append((tuner.probe_seconds if tuner else 0.0) / steps * 1e3)
            figures.activation_gib.append(mean(held))
            figures.peak_gib.append(peak(self.device))
        if tuner:
            tuner.close()

    def step(self, case: Case, optimizer: Any, tuner: SparseTuner | None, step: int) -> float:
        """One optimizer step; returns GiB held after the forward."""
        if tuner:
            tuner.begin_step()
        before = allocated(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=case.precision == "autocast"):
            loss = self.model(**self.batches[step % len(self.batches)], use_cache=False).loss
        held = allocated(self.device) - before
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if tuner:
            tuner.end_step(optimizer)
        return held

    def floor_step(self, step: int) -> float:
        """Forward and backward of the base model, to the embeddings."""

        def ask(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output.requires_grad_()

        handle = self.base.get_input_embeddings().register_forward_hook(ask)
        try:
            before = allocated(self.device)
            loss = self.model(**self.batches[step % len(self.batches)], use_cache=False).loss
            held = allocated(self.device) - before
            loss.backward()
        finally:
            handle.remove()
        return held

    def now(self) -> float:
        """Seconds, when everything that was begun is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def make_model(size: str, device: str) -> LlamaForCausalLM:
    """A Llama of random weights, made on the device."""
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **SIZES[size])  # type: ignore[arg-type]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def allocated(device: str) -> float:
    return torch.cuda.memory_allocated() / 2**30 if device == "cuda" else 0.0


def peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def use_liger(base: nn.Module) -> None:
    """Put Liger's kernels into the model, for good."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=base)  # type: ignore[arg-type]


def compile_layers(base: Any) -> None:
    """Compile each layer by itself, for good."""
    for layer in base.model.layers:
        layer.compile()


def groups_in_order(names: list[str]) -> Iterator[tuple[str, tuple[Case, ...]]]:
    """What changes the model for good comes last; Liger and compilation are not mixed in one process."""
    for name in GROUPS:
        if name in names:
            yield name, GROUPS[name]


def measure(bench: Bench, cases: tuple[Case, ...], rounds: int, done: Callable[[str, Figures], None]) -> None:
    """Run the cases of a group in turn; compiled ones one after the other, since their graphs share one table."""
    compiled = cases[0].compiled
    for turn in [(case,) for case in cases] if compiled else [cases]:
        figures = {case.name: Figures() for case in turn}
        if compiled:
            torch._dynamo.reset()
        for number in range(-1 if compiled else 0, rounds + 1):  # Up to 0 they warm up; graphs take longer.
            for case in turn:
                if case.name not in figures:
                    continue
                try:
                    bench.round(case, INTERVAL, figures[case.name] if number > 0 else None)
                except Exception:
                    print(case.name, traceback.format_exc(limit=-4), flush=True)
                    del figures[case.name]
        for name, found in figures.items():
            done(name, found)


def main() -> None:
    """Measure and write `results/NAME.json` after each group."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--probe-rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=[name for name in GROUPS if name != "compiled"])
    parser.add_argument("--folder", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if {"compiled", "liger"} <= {*options.groups}:
        raise SystemExit("compiled and liger change the model for good: measure them in two runs.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(options.size, device, options.rows, options.tokens, options.probe_rows)
    result: dict[str, Any] = {
        "name": options.name,
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})",
        "versions": {
            "ist": ist.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "python": platform.python_version(),
        },
        "config": {name: value for name, value in vars(options).items() if name not in ("folder", "name")},
        "weights_gib": sum(p.numel() * p.element_size() for p in bench.base.parameters()) / 2**30,
        "rows": {},
    }
    file = options.folder / f"{options.name}.json"
    for name, cases in groups_in_order(options.groups):
        if name == "liger":
            use_liger(bench.base)
            from importlib.metadata import version

            result["versions"]["liger-kernel"] = version("liger-kernel")
        if name == "compiled":
            compile_layers(bench.base)

        def done(row: str, figures: Figures) -> None:
            result["rows"][row] = asdict(figures)
            step, held = median(figures.step_ms), median(figures.activation_gib)
            print(f"{row}: {step:.1f} ms, of it probes {median(figures.probe_ms):.1f}; {held:.2f} GiB", flush=True)

        measure(bench, cases, options.rounds, done)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
