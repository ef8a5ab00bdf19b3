"""Measure a step of LoRA and of IST in one process and in several: time, bytes of gradients sent, memory of each rank.

python benchmarks/distributed/run.py cpu --processes 1 2
python benchmarks/distributed/run.py gpus --size large --processes 1 2 4

Every figure comes from processes of its own, and the methods take turns, so that both see the same machine. Writes
`results/NAME.json`; `make tables` puts it into docs/distributed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from commit import commit  # noqa: E402

SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "model": {
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 4096,
        },
        "dtype": "float32",
        "batch_size": 2,
        "length": 128,
        "lora": {"r": 32, "lora_alpha": 64},
    },
    "large": {  # LLaMA-7B's shape
        "model": {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32000,
        },
        "dtype": "bfloat16",
        "batch_size": 4,
        "length": 512,
        "lora": {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05},
    },
}
METHODS = ("lora", "ist")
ENGINES = ("ddp", "fsdp2")


def measure(config: dict[str, Any], processes: int, method: str, engine: str) -> list[dict[str, Any]]:
    """The figures of each rank."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *(str(HERE / "worker.py"), json.dumps(config), method, engine, str(file)),
        ]
        subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **os.environ})
        return json.loads(file.read_text(encoding="utf-8"))


def row(runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The median over repeats of the slowest rank's time; the largest memory of each rank."""
    return {
        "median_step_seconds": statistics.median(max(r["median_step_seconds"] for r in run) for run in runs),
        "mean_step_seconds": statistics.median(max(r["mean_step_seconds"] for r in run) for run in runs),
        "repeats": [max(r["median_step_seconds"] for r in run) for run in runs],
        "reduced_bytes_per_step": runs[0][0]["reduced_bytes_per_step"],
        "peak_memory_bytes": [max(run[rank]["peak_memory_bytes"] for run in runs) for rank in range(len(runs[0]))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the result")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--engines", choices=ENGINES, nargs="+", default=list(ENGINES))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    given = parser.parse_args()
    config = {**SIZES[given.size], "warmup": 5, "steps": given.steps, "ist": {"update_interval": 10}}
    cases = [
        (processes, engine, method)
        for processes in given.processes
        for engine in (given.engines if processes > 1 else ["none"])
        for method in METHODS
    ]
    runs: dict[tuple[int, str, str], list[Any]] = {case: [] for case in cases}
    for _ in range(given.repeats):
        for processes, engine, method in cases:
            runs[processes, engine, method].append(measure(config, processes, method, engine))
    result = {
        "name": given.name,
        "commit": commit(),
        "device": runs[cases[0]][0][0]["device"],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "config": config,
        "repeats": given.repeats,
        "rows": [
            {"processes": processes, "engine": engine, "method": method, **row(runs[processes, engine, method])}
            for processes, engine, method in cases
        ],
    }
    given.results.mkdir(parents=True, exist_ok=True)
    file = given.results / f"{given.name}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
