"""What the benchmarks of time and memory share: models of random weights, clocks, counters and JSON files."""

from __future__ import annotations

import gc
import json
import platform
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

import ist
from commit import commit, versions
from ist.runs.files import write_whole

__all__ = ["FIVE", "GIB", "SEVEN", "Recorder", "allocated", "free", "make_model", "now", "peak", "reset_peak"]

GIB = 2**30
FIVE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
"""Where the paper has LoRA in a Llama."""
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Shape = dict[str, int]
SHAPES: dict[str, Shape] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 8, "num_attention_heads": 4},
    "narrow": {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 32, "num_attention_heads": 16},
    "tinyllama": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""Llamas; `narrow` is to have many layers."""
GPT2_SHAPES: dict[str, Shape] = {
    "gpt2": {},
    "gpt2-tiny": {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 512},
}


def model_config(size: str, layers: int | None = None) -> PretrainedConfig:
    """The shape of a model, with another number of layers if one is given."""
    if size in GPT2_SHAPES:
        return GPT2Config(**{**GPT2_SHAPES[size], **({"n_layer": layers} if layers else {})})  # type: ignore[arg-type]
    shape = {**SHAPES[size], **({"num_hidden_layers": layers} if layers else {})}
    vocabulary = 512 if size == "tiny" else 32000
    return LlamaConfig(vocab_size=vocabulary, max_position_embeddings=4096, **shape)  # type: ignore[arg-type]


def make_model(size: str, device: str, layers: int | None = None, attention: str = "sdpa") -> Any:
    """A model of random weights in bfloat16, made on the device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(model_config(size, layers), attn_implementation=attention)
    finally:
        torch.set_default_dtype(before)


def token_batches(num: int, rows: int, tokens: int, device: str) -> list[dict[str, torch.Tensor]]:
    """Batches of random tokens, which are their own labels."""
    ids = torch.randint(500, (num, rows, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    return [{"input_ids": part, "labels": part} for part in ids]


def find_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def now(device: str) -> float:
    """Seconds, when everything that was begun is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def allocated(device: str) -> int:
    """Bytes of tensors on a GPU; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def peak(device: str) -> int:
    """The most bytes of tensors since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def free(device: str) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def shorten(error: BaseException) -> str:
    """An error's kind and the first line of its text."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def header(name: str, device: str) -> dict[str, Any]:
    """What every result begins with: which one it is, and of what, when and where."""
    return {
        "name": name,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})",
        "versions": {"ist": ist.__version__, **versions("torch", "transformers", "peft")},
    }


class Recorder:
    """One JSON file that is whole after every write, so that a run that is cut off leaves what it had.

    Args:
        folder: where the file goes.
        name: of the file, without its ending.
        config: every setting of the run.
        kind: what was measured, where a folder holds results of several programs.
    """

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], kind: str) -> None:
        self.file = folder / f"{name}.json"
        self.result: dict[str, Any] = {
            **header(name, find_device()),
            "kind": kind,
            "config": dict(config),
            "rows": {},
        }
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def finished(self) -> Any:
        """Around the run: write at its end, also after an exception or when it is told to stop, that it has ended."""
        start = time.perf_counter()
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            yield self.result
        finally:
            signal.signal(signal.SIGTERM, before)
            self.result["seconds"] = round(time.perf_counter() - start, 1)
            self.result["finished"] = True
            self.write()

    def write(self) -> None:
        """Replace the file."""
        write_whole(self.file, json.dumps(self.result, indent=1, default=str) + "\n")


def settings(options: Any) -> dict[str, Any]:
    """The arguments of a command that say what is run."""
    return {name: value for name, value in vars(options).items() if name not in ("folder", "name")}
