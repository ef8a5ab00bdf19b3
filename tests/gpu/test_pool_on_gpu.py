"""Processes of the benchmark of quality on a GPU: forked after all libraries are imported, they can use CUDA."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SCRIPT = f"""
import sys
sys.path.append({str(Path(__file__).parents[2] / "benchmarks")!r})
from quality.forking import start_method

def compute(connection):
    ready = "quality.train" in sys.modules and "peft" in sys.modules
    import torch
    connection.send((ready, torch.cuda.is_available(), torch.ones(3, device="cuda").sum().item()))

if __name__ == "__main__":
    context = start_method()
    for _ in range(2):
        here, there = context.Pipe()
        process = context.Process(target=compute, args=(there,))
        process.start()
        there.close()
        print(context.get_start_method(), *here.recv())
"""


def test_forked_processes_use_the_gpu(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False, timeout=250)
    assert done.stdout.splitlines() == ["forkserver True True 3.0"] * 2, done.stderr
