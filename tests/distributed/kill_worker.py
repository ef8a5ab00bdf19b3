"""Kill trainings at random moments, resume them, and compare each with one that nobody killed.

python tests/distributed/kill_worker.py RESULT.json PROCESSES KILLS SEED

Everything is imported once; each training is a forked child (two of them talk to one another), which SIGKILL ends. Some
kills aim at the writing of a checkpoint. What is compared to the bit: adapter, importance, optimizer state, the
states of the random generators and the history.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy
import torch
from device import BACKEND, ON_CPUS, on_one_gpu
from launch import free_port
from transformers import Trainer, TrainingArguments

from ist import IST, last_checkpoint, read_history
from ist.runs.checkpoints import MANIFEST_FILE
from tests.helpers.tiny import tiny_lora, tiny_rows

NUM_STEPS = 40
SAVE_STEPS = 4
MAX_RUNS = 6
AFTER_LAST = "after the last checkpoint"
LINGER = 0.3
"""Seconds that a training takes to end after its last checkpoint, so that kills there are no matter of luck."""


def train(folder: Path, rank: int, num_processes: int) -> None:
    """A training of `NUM_STEPS` steps, from the last whole checkpoint where there is one."""
    ist = IST(num_active_layers=2, update_interval=3, mu=20.0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=NUM_STEPS,
        learning_rate=1e-2,
        weight_decay=0.1,
        logging_steps=1,
        save_steps=SAVE_STEPS,
        save_total_limit=3,
        report_to=[],
        use_cpu=ON_CPUS,
        disable_tqdm=True,
        ddp_backend=BACKEND if num_processes > 1 else None,
    )
    trainer = Trainer(
        model=tiny_lora(lora_dropout=0.1),
        args=on_one_gpu(arguments),
        train_dataset=tiny_rows(96),  # type: ignore[arg-type]
        callbacks=[ist],
    )
    checkpoint = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    assert ist.tuner
    time.sleep(LINGER)
    (folder / f"final.{rank}.json").write_text(json.dumps(final_state(trainer, ist)))


def final_state(trainer: Any, ist: Any) -> dict[str, Any]:
    """Digests of everything that a resumed run has to have as an uninterrupted one has it."""
    model = trainer.model
    states = trainer.optimizer.state_dict()["state"]
    return {
        "adapter": digest([p for p in model.parameters() if p.requires_grad]),
        "optimizer": digest([v for key in sorted(states) for _, v in sorted(states[key].items())]),
        "importance": ist.tuner.selector.state_dict(),
        "num_probes": ist.tuner.state_dict()["num_probes"],
        "generators": digest(
            [
                torch.get_rng_state(),
                str(random.getstate()),
                str(numpy.random.get_state(legacy=False)),
                *([] if ON_CPUS else [torch.cuda.get_rng_state()]),
            ]
        ),
    }


def digest(values: list[Any]) -> str:
    total = hashlib.sha256()
    for value in values:
        tensor = isinstance(value, torch.Tensor)
        total.update(value.detach().cpu().numpy().tobytes() if tensor else str(value).encode())  # type: ignore[union-attr]
    return total.hexdigest()


def history_of(folder: Path) -> list[Any]:
    """The events of a run, but for what a resume adds and the Trainer's summary, which has times and means in it."""
    return [event for event in read_history(folder) if event["event"] != "run" and "train_loss" not in event]


def start(folder: Path, num_processes: int) -> list[int]:
    """Fork the processes of one training."""
    port = str(free_port())
    children = []
    for rank in range(num_processes):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if num_processes > 1:
                    shared = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
                    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                    os.environ.update({k: str(v) for k, v in {**shared, **where}.items()})
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
                log = os.open(folder / f"log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                train(folder, rank, num_processes)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return children


def finish(children: list[int], patience: float = 60.0) -> list[int]:
    """Wait for all; when one fails, the others are killed, as torchrun does."""
    statuses: dict[int, int] = {}
    end = time.monotonic() + patience
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    statuses[child] = os.waitstatus_to_exitcode(status)
        if any(statuses.values()) or time.monotonic() > end:
            for child in children:
                if child not in statuses:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return [statuses[child] for child in children]


def wait_for_moment(chance: random.Random, folder: Path, seconds: float) -> str:
    """Sleep until it is time to kill: anywhere in the training, within the writing of a checkpoint, or after the last
    checkpoint, when nothing is left to train.
    """
    if (where := chance.random()) < 0.5:
        time.sleep(chance.uniform(0.15, 0.95) * seconds)
        return "any moment"
    end = time.monotonic() + 2 * seconds
    if where > 0.8:
        manifest = folder / f"checkpoint-{NUM_STEPS}" / MANIFEST_FILE
        while not manifest.exists() and time.monotonic() < end:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, LINGER))
        return AFTER_LAST
    target = folder / f"checkpoint-{SAVE_STEPS * chance.randint(1, NUM_STEPS // SAVE_STEPS)}"
    while not target.exists() and time.monotonic() < end:
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.02))
    return f"writing of {target.name}"


def killed_run(folder: Path, num_processes: int, chance: random.Random, seconds: float) -> dict[str, Any]:
    """One training that is killed once, or twice, and resumed until it is done."""
    kills: list[dict[str, Any]] = []
    wanted = chance.choice((1, 1, 2))
    for _ in range(MAX_RUNS):
        children = start(folder, num_processes)
        if len(kills) < wanted:
            aim = wait_for_moment(chance, folder, seconds)
            victim = chance.choice(children)
            os.kill(victim, signal.SIGKILL)
            if not any(finish(children)):
                break  # It was done before the kill.
            kills.append({"aim": aim, **damage(folder)})
        elif any(finish(children)):
            return {"kills": kills, "error": (folder / "log.0").read_text()[-3000:]}
        else:
            break
    return {"kills": kills}


def damage(folder: Path) -> dict[str, Any]:
    """What a kill left, as the next run will find it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = last_checkpoint(folder)
    history = folder / "ist_history.jsonl"
    steps = [event["step"] for event in read_history(folder) if event["event"] == "step"] if history.exists() else []
    unsealed = sorted(path.name for path in folder.glob("checkpoint-*") if not (path / MANIFEST_FILE).exists())
    resumed = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    return {
        "step": max(steps, default=0),
        "unsealed": unsealed,
        "damaged": [str(warning.message).partition("(")[2].partition(")")[0] for warning in caught],
        "resumed_from": resumed,
        "steps_lost": max(max(steps, default=0) - resumed, 0),
    }


def outcome(folder: Path, num_processes: int) -> dict[str, Any]:
    finals = [json.loads((folder / f"final.{rank}.json").read_text()) for rank in range(num_processes)]
    return {"finals": finals, "history": history_of(folder)}


def main(file: Path, num_processes: int, num_kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as parent:
        whole = Path(parent) / "whole"
        whole.mkdir()
        began = time.monotonic()
        if any(finish(start(whole, num_processes))):
            raise SystemExit((whole / "log.0").read_text()[-3000:])
        seconds = time.monotonic() - began
        expected = outcome(whole, num_processes)
        runs = []
        while sum(len(run["kills"]) for run in runs) < num_kills:
            folder = Path(parent) / f"killed-{len(runs)}"
            folder.mkdir()
            run = killed_run(folder, num_processes, random.Random(f"{seed} {len(runs)}"), seconds)
            if "error" not in run:
                seen = outcome(folder, num_processes)
                run["differing"] = [
                    name for name in seen["finals"][0] if any(a[name] != b[name] for a, b in pairs(seen, expected))
                ] + (["history"] if seen["history"] != expected["history"] else [])
                run["steps"] = [event["step"] for event in seen["history"] if event["event"] == "step"]
            runs.append(run)
    result = {"processes": num_processes, "seed": seed, "steps": NUM_STEPS, "save_steps": SAVE_STEPS, "runs": runs}
    file.write_text(json.dumps(result, indent=1) + "\n")


def pairs(seen: dict[str, Any], expected: dict[str, Any]) -> list[tuple[Any, Any]]:
    return list(zip(seen["finals"], expected["finals"], strict=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
