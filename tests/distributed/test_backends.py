"""On every engine: the layers of one process without any, its weights, and nothing of a frozen layer moves."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import backends
from launch import launch
from matrix import note

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "backend_worker.py"
CASES = [
    f"{engine}:{checkpointing}:{accumulation}"
    for engine, checkpointing, accumulation in itertools.product(backends.ENGINES, backends.CHECKPOINTING, (1, 2))
    # DDP's own search for unused parameters fails with reentrant checkpointing, without IST too.
    if (engine, checkpointing) != ("ddp-unused", "reentrant")
]
GPU_CASES = [
    f"{engine}:{checkpointing}:{accumulation}"
    for engine, checkpointing, accumulation in itertools.product(
        backends.GPU_ENGINES, ("none", "non-reentrant"), (1, 2)
    )
]
FAMILIES = ("ddp", "fsdp2", "fsdp1")

Results = Callable[..., list[dict[str, Any]]]


@cache
def reference(accumulation: int) -> dict[str, Any]:
    """The same training in this process, without an engine."""
    found = backends.train(backends.plain, accumulation=accumulation)
    return {**found, "weights": {name: weight.cpu() for name, weight in found["weights"].items()}}


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank saw in a case; all cases of a family of engines come from one launch."""

    @cache
    def family_run(family: str, num_processes: int, device: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp(f"{family}-{num_processes}-{device}")
        cases = [case for case in (CASES if device == "cpu" else GPU_CASES) if case.startswith(family)]
        finished = launch([WORKER, folder, *cases], num_processes, env={"IST_TEST_DEVICE": device})
        return folder, "\n".join(process.stderr[-2000:] for process in finished)

    def of_case(case: str, num_processes: int, device: str = "cpu") -> list[dict[str, Any]]:
        family = next(family for family in FAMILIES if case.startswith(family))
        folder, errors = family_run(family, num_processes, device)
        ranks = []
        for rank in range(num_processes):
            file = folder / f"{case}.{rank}.json"
            assert file.is_file(), f"rank {rank} did not get to this case:\n{errors}"
            ranks.append(json.loads(file.read_text()))
            assert "error" not in ranks[-1], ranks[-1].get("trace")
        ranks[0]["weights"] = torch.load(folder / f"{case}.pt", weights_only=True)
        return ranks

    return of_case


def check(ranks: list[dict[str, Any]], case: str) -> None:
    """What has to hold on every engine."""
    engine, _, accumulation = case.split(":")
    expected = reference(int(accumulation))
    for seen in ranks:
        assert seen["frozen_moved"] == [], "a frozen weight or its optimizer state moved"
        assert seen["frozen_reached"] == [], "a gradient was computed for a frozen weight"
        assert seen["active_unmoved"] == []
        assert seen["actives"] == expected["actives"]
        assert seen["losses"] == ranks[0]["losses"], "losses of candidates are not the same on all ranks"
        assert seen["importance"] == ranks[0]["importance"]
        assert seen["ranks_agree"]
    loose = engine in backends.LOW_PRECISION
    torch.testing.assert_close(
        torch.tensor(ranks[0]["losses"]), torch.tensor(expected["losses"]), rtol=3e-2 if loose else 1e-4, atol=1e-5
    )
    assert ranks[0]["weights"].keys() == expected["weights"].keys()
    for name, weight in ranks[0]["weights"].items():
        # Adam's first steps are of the size of lr whatever the gradient's, so low precision shows in single weights.
        error = (weight - expected["weights"][name]).abs().mean() / expected["weights"][name].abs().mean()
        assert error < (0.5 if loose else 1e-3), name
    if engine.startswith("ddp"):
        sent, full = ranks[0]["reduced_bytes"]
        assert 0 < sent < full, "gradients of frozen layers were sent"


def option(case: str) -> str:
    _, checkpointing, accumulation = case.split(":")
    return f"checkpointing {checkpointing}, accumulation {accumulation}"


@pytest.mark.parametrize(
    # FSDP1 shards nothing on one process, and is refused there.
    ("case", "num_processes"),
    [(case, n) for n in (1, 2) for case in CASES if n == 2 or not case.startswith("fsdp1")],
)
def test_engine(case: str, num_processes: int, results: Results) -> None:
    check(results(case, num_processes), case)
    note(backends.ENGINES[case.split(":")[0]][0], option(case), num_processes, "right", "test_engine")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("case", GPU_CASES)
def test_engine_on_gpus(case: str, num_processes: int, results: Results) -> None:
    if torch.cuda.device_count() < num_processes:
        pytest.skip(f"needs {num_processes} GPUs")
    check(results(case, num_processes, "cuda"), case)
    name = backends.GPU_ENGINES[case.split(":")[0]][0]
    note(f"{name}, on a GPU", option(case), num_processes, "right", "test_engine_on_gpus")


def test_reduced_bytes_are_those_of_the_active_layers(results: Results) -> None:
    """Half of four equal layers are active, so half of the bytes travel."""
    sent, full = results("ddp:none:1", 2)[0]["reduced_bytes"]
    assert full == backends.NUM_STEPS * sum(weight.nbytes for weight in reference(1)["weights"].values())
    assert sent == full // 2
