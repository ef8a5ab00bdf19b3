"""The commands that docs/distributed.md quotes, run as quoted: only model, data and length are put in."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from device import ON_CPUS
from launch import free_port
from matrix import note

from ist import read_history

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PATH = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]
NUM_STEPS = 8
STORE_OF_THEIR_OWN = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""What the page says to set where processes that are started again talk over gloo."""


def quoted(start: str) -> list[str]:
    """The one command of the page that starts so."""
    (command,) = [command for command in COMMANDS if command.startswith(start)]
    return shlex.split(command)


def run(
    command: list[str],
    model: Path,
    folder: Path,
    environment: Mapping[str, str] = MappingProxyType({}),
    num_test_problems: int = 8,
) -> subprocess.CompletedProcess[str]:
    """A quoted command with a tiny model and a free port, in the project's folder."""
    flags = {
        "--model_name_or_path": model,
        "--task": "word-problems",
        "--num_train_problems": 64,
        "--num_test_problems": num_test_problems,
        "--output_dir": folder,
        "--max_steps": NUM_STEPS,
        "--save_steps": 2,
        "--update_interval": 2,
        "--per_device_train_batch_size": 2,
        "--lora_r": 4,
        "--use_cpu": str(ON_CPUS).lower(),
        "--bf16": "false",
    }
    port = ["--main_process_port" if command[0] == "accelerate" else "--master-port", str(free_port())]
    port = [] if "--standalone" in command else port
    place = 2 if command[0] == "accelerate" else 1
    command = [str(BIN / command[0]), *command[1:place], *port, *command[place:]]
    command = [part for part in command if part not in ("--recipe", "quickstart")]
    process = subprocess.Popen(
        [*command, *(str(part) for flag in flags.items() for part in flag)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:  # which closes its pipes, also after a timeout
        try:
            out, err = process.communicate(timeout=100)
        finally:
            end(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def end(process: subprocess.Popen[str]) -> None:
    """End a launcher that is still there: asked first, since it alone knows its processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
            return


def steps_of(folder: Path) -> list[int]:
    return [event["step"] for event in read_history(folder) if event["event"] == "step"]


def check_run(process: subprocess.CompletedProcess[str], folder: Path, validation: bool = True) -> None:
    """Finished, told once, and all there."""
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("adapter: ") == 1, "one process speaks"
    result = json.loads((folder / "ist_result.json").read_text())
    assert (result["num_processes"], result["num_steps"]) == (2, NUM_STEPS)
    assert set(result["before"]) == set(result["after"]) == ({"loss", "accuracy"} if validation else set())
    assert steps_of(folder) == list(range(1, NUM_STEPS + 1))
    assert load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("start", ["accelerate launch", "torchrun --nproc-per-node 2 -m"])
def test_the_quoted_command_runs(start: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    check_run(run(quoted(start), tiny_model_folder, folder), folder)
    note(start.removesuffix(" --nproc-per-node 2 -m"), "the quoted command", 2, "right", "test_the_quoted_command_runs")


def test_a_killed_process_is_started_again_and_goes_on(tiny_model_folder: Path, tmp_path: Path) -> None:
    """torchrun's elastic restart: rank 1 kills itself once, in the middle of a run."""
    site = tmp_path / "site"
    site.mkdir()
    killer = site / "killer.py"
    killer.write_text(
        "import os, signal, sys\n"
        "from transformers import TrainerCallback\n"
        "import ist.cli.train.command as command\n"
        "class Kill(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **kwargs):\n"
        "        first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "        if first and state.global_step == 5 and os.environ['RANK'] == '1':\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "make_trainer = command.make_trainer\n"
        "def with_kill(*arguments):\n"
        "    trainer = make_trainer(*arguments)\n"
        "    trainer.add_callback(Kill())\n"
        "    return trainer\n"
        "command.make_trainer = with_kill\n"
        "from ist.cli.main import main\n"
        "sys.exit(main())\n"
    )
    command = quoted("torchrun --standalone --nproc-per-node 2 --max-restarts")
    module = command.index("-m")
    command = [*command[:module], str(killer), *command[module + 2 : -2]]
    folder = tmp_path / "run"
    check_run(run(command, tiny_model_folder, folder, STORE_OF_THEIR_OWN), folder)
    runs = [event for event in read_history(folder) if event["event"] == "run"]
    assert [event["step"] for event in runs] == [0, 4], "it went on from checkpoint-4"
    note("torchrun --max-restarts", "SIGKILL of one rank", 2, "right", "test_a_killed_process_is_started_again")


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What `accelerate launch` gives its processes for examples/distributed/fsdp2.yaml."""


FSDP1 = {
    **FSDP2,
    "FSDP_VERSION": "1",
    "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_SYNC_MODULE_STATES": "false",
}
"""The same for `fsdp_version: 1`; to send weights from rank to rank takes an accelerator."""


@pytest.mark.parametrize("validation", [True, False], ids=["validation before training", "no validation"])
@pytest.mark.parametrize("backend", ["DDP", "FSDP2"])
def test_ranks_hold_one_adapter(backend: str, validation: bool, tiny_model_folder: Path, tmp_path: Path) -> None:
    """Evaluating first marks the bare model as prepared: DDP's ranks then trained apart, and FSDP2 refused to train."""
    command = worker_command()
    folder = tmp_path / "run"
    environment = FSDP2 if backend == "FSDP2" else {}
    check_run(run(command, tiny_model_folder, folder, environment, 8 if validation else 0), folder, validation)
    first, second = ((folder / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    option = "validation before training" if validation else "no validation"
    note(f"torchrun, {backend}", option, 2, "right", "test_ranks_hold_one_adapter")


def worker_command() -> list[str]:
    """The page's command of torchrun, with a worker that leaves a hash in the place of `ist`."""
    command = quoted("torchrun --nproc-per-node 2 -m")
    module = command.index("-m")
    return [*command[:module], str(Path(__file__).parent / "launched_worker.py"), *command[module + 2 :]]


@pytest.mark.parametrize("method", ["random", "peft"])
def test_fsdp1_is_refused_before_a_training_that_could_not_be_saved(
    method: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """PEFT 0.21 writes an adapter's file without weights there, without a word."""
    folder = tmp_path / "run"
    process = run([*worker_command(), "--method", method], tiny_model_folder, folder, FSDP1)
    assert process.returncode != 0
    lines = [line for line in process.stderr.splitlines() if "ist train: " in line]
    assert lines
    said = r"error: PEFT [\d.]+ saves no weights of an adapter on .* FSDP1 wraps, .*: use FSDP2 \(fsdp_version: 2\)\.$"
    assert all(re.search(rf"ist train: (\[rank 1\] )?{said}", line) for line in lines), lines
    assert not list(folder.rglob("adapter_model.safetensors"))


def test_an_error_names_the_rank_and_is_one_line(tiny_model_folder: Path, tmp_path: Path) -> None:
    process = run([*quoted("torchrun --nproc-per-node 2 -m"), "--num_active_layers", "9"], tiny_model_folder, tmp_path)
    assert process.returncode != 0
    lines = [line for line in process.stderr.splitlines() if "ist train: " in line]
    assert lines
    assert all(re.search(r"ist train: (\[rank 1\] )?error: num_active_layers", line) for line in lines)
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "distributed").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_the_configuration(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config: Any = load_config_from_file(str(file))
    assert config.num_processes == 2
    assert f"examples/distributed/{file.name}" in file.read_text().splitlines()[0]
    assert f"examples/distributed/{file.name})" in PAGE
