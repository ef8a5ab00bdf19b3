"""Show that a change of the code leaves every training equal to the bit.

Train the cases with the code before and after the change, then compare:

    git worktree add ../before COMMIT
    PYTHONPATH=../before/src python benchmarks/unchanged/run.py before.json
    PYTHONPATH=src python benchmarks/unchanged/run.py after.json
    python benchmarks/unchanged/run.py --compare before.json after.json

Both runs have to be made on one machine with the same versions of all packages, since rounding depends on them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes", "numpy")
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}


def library_commit() -> str:
    """The commit of the library that is imported, marked where its files differ from it."""
    import ist

    folder = Path(str(ist.__file__)).parent

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)

    commit = git("rev-parse", "--short=12", "HEAD").stdout.strip() or "unknown"
    return f"{commit}-dirty" if git("status", "--porcelain", "--", ".").stdout else commit


def installed(package: str) -> str:
    """The version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def attempt(name: str) -> dict[str, Any]:
    """The result of a case, or why there is none; what the trainers print is dropped."""
    from tiny_models import SkippedError
    from training_cases import train_case

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return train_case(name)
    except SkippedError as reason:
        return {"skipped": str(reason)}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def train_cases(names: list[str]) -> dict[str, Any]:
    """Train cases, all of them where none is named; a case that fails does not stop the others.

    Raises:
        ValueError: there is no case of that name.
    """
    import torch
    import transformers
    from training_cases import CASES

    if unknown := [name for name in names if name not in CASES]:
        raise ValueError(f"Unknown case {', '.join(map(repr, unknown))}: the cases are {', '.join(map(repr, CASES))}.")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for logger in ("ist", "bitsandbytes"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    for name in names or CASES:
        start = time.perf_counter()
        results[name] = result = attempt(name)
        reason = next((f"{word}: {result[word]}" for word in ("skipped", "failed") if word in result), "")
        print(f"{name:20} {time.perf_counter() - start:5.1f} s  {reason}".rstrip(), flush=True)
    return results


def record(output: Path, names: list[str]) -> int:
    """Train cases and write their results.

    Returns:
        1 where a case failed, else 0.
    """
    os.environ.update(ENVIRONMENT)
    start = time.perf_counter()
    cases = train_cases(names)
    import torch

    run = {
        "commit": library_commit(),
        "device": f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})",
        "versions": {"python": platform.python_version(), **{package: installed(package) for package in PACKAGES}},
        "seconds": round(time.perf_counter() - start, 1),
        "cases": cases,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    print(f"{output}: commit {run['commit']}, {len(cases)} cases in {run['seconds']} s")
    return 1 if any("failed" in case for case in cases.values()) else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", help="file to write")
    parser.add_argument("cases", nargs="*", help="names of cases to train; all if left out")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="compare two files instead")
    options = parser.parse_args()
    if (options.output is None) == (options.compare is None):
        parser.error("give a file to write, or --compare with two files")
    try:
        if options.compare:
            from compare_runs import compare_files

            return compare_files(*options.compare)
        return record(options.output, options.cases)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
