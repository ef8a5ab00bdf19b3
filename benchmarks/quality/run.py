"""Run what is left of plans of trainings: python benchmarks/quality/run.py PLAN ... --model FOLDER --data FOLDER ...

Called again it goes on: a training whose line is in a result file is not run again. See `--help`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from commit import commit  # noqa: E402
from quality.memory import Memory, device_memory  # noqa: E402
from quality.part import Part, read_share  # noqa: E402
from quality.plan import describe, read_plan, select, settings  # noqa: E402
from quality.pool import Home, Inline, Pool  # noqa: E402
from quality.session import KINDS, Plan, Session, expand_all  # noqa: E402
from step_time.shares import time_shares  # noqa: E402

RESULTS = HERE / "results"
SHOWN = 5
WORK = Path(tempfile.gettempdir()) / "ist-quality"


def read_lines(files: Iterable[Path], model: str | None = None) -> dict[str, dict[str, Any]]:
    """The lines of result files by id; a good one counts before one with an error, and a cut-off last line for none.
    Nor does one whose rows ended with another token than the model's answers, which no call trains any more.

    Args:
        files: of JSON lines.
        model: whose lines alone count, since an id does not name the model; None is every model's.
    """
    lines: dict[str, dict[str, Any]] = {}
    for file in files:
        for text in file.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if (model is not None and line.get("model", model) != model) or line.get("rows_end"):
                continue
            if line["id"] not in lines or "error" in lines[line["id"]]:
                lines[line["id"]] = line
    return lines


def prepare_all(plans: Sequence[Plan], options: argparse.Namespace) -> dict[str, str]:
    """The files with the tokens of the plans' tasks; those that are not there are made side by side.

    Raises:
        ValueError: two plans cut or choose the rows of a task in different ways, or the tokenizer ends rows in another
            way than the model ends answers.
    """
    from transformers import AutoTokenizer

    from quality.tasks import prepared_file

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    check_ends(options.model, tokenizer)
    files: dict[str, Path] = {}
    jobs = []
    for plan in plans:
        for task in plan["tasks"]:
            setting = settings(plan, task)
            file = prepared_file(task, tokenizer, setting, options.work)
            if task not in files and not file.exists():
                jobs.append((task, options.data, options.model, setting, str(options.work)))
            if files.setdefault(task, file) != file:
                raise ValueError(f"These plans have different rows of {task}: run one after the other.")
    if len(jobs) < 2 or not options.processes:
        for job in jobs:
            prepare_one(job)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(len(jobs), options.processes), mp_context=context) as executor:
            list(executor.map(prepare_one, jobs))
    return {task: str(file) for task, file in files.items()}


def check_ends(model: str, tokenizer: Any) -> None:
    """Raise ValueError where rows would end with a token that does not end the model's own answers."""
    from transformers import AutoConfig

    own = AutoConfig.from_pretrained(model).eos_token_id
    ends = own if isinstance(own, list) else [own]
    if own is not None and tokenizer.eos_token_id not in ends:
        named = " or ".join(map(str, tokenizer.convert_ids_to_tokens(ends)))
        raise ValueError(
            f"Rows would end with {tokenizer.eos_token}, the tokenizer's eos_token, and answers of {model} end with "
            f"{named}: save its tokenizer again with that eos_token, since other trainings of this model end so."
        )


def prepare_one(job: tuple[str, str, str, dict[str, Any], str]) -> None:
    """Make one task's file."""
    from transformers import AutoTokenizer

    from quality.tasks import prepare

    task, data, model, setting, work = job
    prepare(task, data, AutoTokenizer.from_pretrained(model), setting, work)


def count_rows(prepared: Mapping[str, str]) -> dict[str, int]:
    """Training rows of each task."""
    return {task: pickle.loads(Path(file).read_bytes()).counts["train"] for task, file in prepared.items()}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("plans", nargs="+", metavar="PLAN", help="a name in plans/ or a file; NAME:TASK,TASK for some")
    parser.add_argument("--model", required=True, help="folder of the model and its tokenizer")
    parser.add_argument("--name", help="what the lines call the model; its folder's name without this")
    parser.add_argument("--data", required=True, help="folder with commonsense, math, sst2 and wikitext-2")
    parser.add_argument("--output", type=Path, required=True, help="the JSON-lines file that takes the results")
    parser.add_argument("--results", type=Path, nargs="*", default=[RESULTS], help="folders with what is done already")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for tokens")
    parser.add_argument("--processes", type=int, default=1, help="trainings side by side; 0: one, in this process")
    parser.add_argument("--seconds", type=float, default=420.0, help="start no training after these")
    parser.add_argument("--limit", type=float, default=560.0, help="give up what still runs after these")
    parser.add_argument(
        "--memory",
        type=float,
        help="GiB that trainings side by side may take of all GPUs together; 95%% of what there is without this",
    )
    parser.add_argument(
        "--step-time", type=Path, help="JSON of step_time with the group focused: its ratios of time count"
    )
    parser.add_argument("--tasks", nargs="+", help="of each plan's tasks these alone")
    parser.add_argument("--methods", nargs="+", help="of each plan's methods these alone")
    parser.add_argument("--without", nargs="+", default=[], metavar="METHOD", help="of the plans' methods not these")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="of each plan's seeds these alone; what is timed is of the first"
    )
    parser.add_argument(
        "--share",
        default="1/1",
        metavar="K/N",
        help="1/2: every second training, 2/2: the others, for two calls of the same plans at once; what waits for "
        "learning rates of the other share is left for a call that finds them",
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of what is left these kinds alone")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--compile", action="store_true", help="compile the layers of models with adapters")
    parser.add_argument("--retry", action="store_true", help="run those again that failed")
    parser.add_argument("--list", action="store_true", help="say what is left, and run nothing")
    return parser.parse_args(arguments)


def load_plan(
    argument: str, tasks: Sequence[str] | None, methods: Sequence[str] | None, without: Sequence[str] = ()
) -> Plan:
    """A plan by its name or file, with some of its tasks and methods alone."""
    name, _, own = (argument, "", "") if Path(argument).is_file() else argument.partition(":")
    file = Path(name) if Path(name).is_file() else HERE / "plans" / f"{name}.yaml"
    return select(read_plan(file), own.split(",") if own else tasks, methods, without)


def load_plans(options: argparse.Namespace) -> list[Plan]:
    """The plans, with the ratios of time that were measured.

    Raises:
        ValueError: no plan has a method of `--without`.
    """
    plans = [load_plan(argument, options.tasks, options.methods, options.without) for argument in options.plans]
    methods = dict.fromkeys(name for plan in plans for name in (*plan["methods"], *plan["left_out"]))
    if unknown := [name for name in options.without if name not in methods]:
        raise ValueError(f"The plans have no {', '.join(unknown)}: their methods are {', '.join(methods)}.")
    if options.step_time and options.step_time.is_file():
        shares = time_shares(json.loads(options.step_time.read_text(encoding="utf-8")))
        print(f"time of a step to LoRA's, from {options.step_time}: {shares}", flush=True)
        plans = [{**plan, "time_shares": {**plan.get("time_shares", {}), **shares}} for plan in plans]
    return plans


def read_seeds(seeds: Sequence[int] | None, plans: Sequence[Plan]) -> frozenset[int] | None:
    """The seeds that `--seeds` names; None without it.

    Raises:
        ValueError: one is named twice, or no plan has it.
    """
    if seeds is None:
        return None
    known = sorted({seed for plan in plans for seed in plan.get("seeds", [0])})
    if unknown := [seed for seed in dict.fromkeys(seeds) if seed not in known]:
        raise ValueError(f"The plans have no seed {listed(unknown)}: give --seeds of {listed(known)}.")
    if twice := [seed for seed in dict.fromkeys(seeds) if list(seeds).count(seed) > 1]:
        raise ValueError(f"--seeds names {listed(twice)} more than once: give each seed once.")
    return frozenset(seeds)


def listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left; 0 where nothing is."""
    begin = time.monotonic()
    options = parse(arguments)
    try:
        plans = load_plans(options)
        part = Part(read_seeds(options.seeds, plans), read_share(options.share))
    except ValueError as error:
        sys.exit(str(error))
    files = [file for folder in options.results for file in sorted(folder.glob("*.jsonl"))]
    name = options.name or Path(options.model).name
    lines = read_lines([*files, *([options.output] if options.output.is_file() else [])], name)
    if options.retry:
        lines = {name: line for name, line in lines.items() if "error" not in line}
    try:
        prepared = prepare_all(plans, options)
    except ValueError as error:
        sys.exit(str(error))
    num_rows = count_rows(prepared)
    print(f"{time.monotonic() - begin:5.0f} s  tokens are there; training rows: {num_rows}", flush=True)
    if not options.list:
        if options.compile:  # Each process compiles by itself: there are many.
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        home = Home(
            options.model,
            name,
            prepared,
            options.device or device(),
            commit(),
            threads(options.processes),
            options.compile,
        )
        pool = Pool(options.processes, home) if options.processes else Inline(home)
        memory = Memory(device_memory(home.device) if options.memory is None else options.memory * 2**30, lines)
        session = Session(
            plans,
            pool,
            lines,
            options.output,
            num_rows,
            options.seconds,
            options.limit,
            begin,
            options.kinds,
            memory,
            part,
        )
        try:
            session.run()
        finally:
            pool.close()
    expansion = expand_all(plans, lines, num_rows, part)
    left = [training for training in expansion.trainings if training["id"] not in lines]
    failed = [training for training in expansion.trainings if "error" in lines.get(training["id"], {})]
    print(f"left: {len(left)} trainings ({'; '.join(describe(left)) or 'none'}), failed: {len(failed)}")
    for reason in expansion.waiting[:SHOWN]:
        print(f"waiting: {reason}")
    if len(expansion.waiting) > SHOWN:
        print(f"and {len(expansion.waiting) - SHOWN} more wait")
    return 1 if left or expansion.waiting else 0


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def threads(processes: int) -> int:
    return max(1, min(len(os.sched_getaffinity(0)) // max(1, processes), int(os.environ.get("OMP_NUM_THREADS", 16))))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # Ends the processes on the way out.
    sys.exit(main())
