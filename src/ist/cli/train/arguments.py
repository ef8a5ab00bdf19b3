"""The command line of `ist train`: TRL's own flags, and this library's beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser
from trl.scripts.utils import DatasetMixtureConfig

from ...config import ISTConfig, check_choice, check_whole
from ...experiments.data.tasks import find_tasks
from ..recipes.files import check_keys, find_recipe, flag_names, read_recipe, run_name, split_recipe
from ..recipes.safety import COMMAND_LINE_ONLY, check_safe
from ..recipes.values import convert_values
from .adapters import adapter_config
from .methods import ADAPTERS, METHODS, check_method, selector_of, settle_adapter, settle_checkpointing, unused_flags
from .numbers import check_numbers

__all__ = ["ISTArguments", "RunArguments", "known_flags", "parse_arguments"]

NO_RESUME = ("false", "no", "none", "null", "")
"""Values of --resume_from_checkpoint, in small letters, that ask for a fresh start."""


@dataclass
class ISTArguments:
    """What `ist train` takes beside TRL's flags."""

    method: str = field(
        default="ist",
        metadata={
            "help": "Which layers a step trains. Adapters: ist (by importance), random, all (the PEFT method alone). "
            "Whole layers: lisa, full (full fine-tuning). Either: lift-front-to-end, lift-end-to-front, lift-random, "
            "fixed (--fixed_layers), greedy (searched first)."
        },
    )
    fixed_layers: str | None = field(
        default=None,
        metadata={
            "help": "With --method fixed: indices (0,3,5) or names (layers.0,layers.3), random (drawn once), top:FILE "
            "or bottom:FILE (the most or least important by the scores in a JSON file or a run's history)."
        },
    )
    greedy_steps: int = field(default=20, metadata={"help": "Steps of each trial of --method greedy."})
    greedy_min_gain: float | None = field(
        default=None, metadata={"help": "Stop the greedy search where a layer lowers the loss by less than this."}
    )
    num_active_layers: str | None = field(
        default="0.25", metadata={"help": "N_u, layers trained at a step: a count (8) or a fraction (0.25)."}
    )
    num_unsuppressed_layers: str | None = field(
        default="0.5", metadata={"help": "N_v, layers that a candidate set leaves unsuppressed: a count or a fraction."}
    )
    num_candidates: int = field(default=3, metadata={"help": "N_c, candidate sets for each importance update."})
    update_interval: int = field(
        default=10, metadata={"help": "T_c, steps between two importance updates; of LISA and LIFT between two sets."}
    )
    beta: float = field(default=0.25, metadata={"help": "Factor on suppressed responses, in [0, 1]."})
    mu: float = field(default=10.0, metadata={"help": "Step size of the importance: 10, or 100 for short trainings."})
    preset: str = field(default="paper", metadata={"help": "paper (the equations) or reference (the authors' code)."})
    policy: str | None = field(default=None, metadata={"help": "uniform or proportional; by preset."})
    candidate_set: str | None = field(default=None, metadata={"help": "unsuppressed or suppressed; by preset."})
    score_step: str | None = field(default=None, metadata={"help": "additive or sigmoid_gradient; by preset."})
    rounding: str | None = field(default=None, metadata={"help": "half_up or truncate; by preset."})
    damping: str | None = field(default=None, metadata={"help": "response or scaling; by preset."})
    probe_batch_size: int | None = field(
        default=None, metadata={"help": "Examples in a probe batch; the training batch's size by default."}
    )
    fused: bool = field(default=True, metadata={"help": "Fused LoRA, which keeps nothing of frozen layers."})
    frozen_dropout: bool = field(default=False, metadata={"help": "Keep the adapters' dropout in frozen layers."})
    recompute: str = field(
        default="none", metadata={"help": "Layers that compute once more in the backward: none, frozen or all."}
    )
    optimizer_state: str = field(
        default="keep", metadata={"help": "What happens to the moments of frozen layers: keep, reset or offload."}
    )
    price: float = field(default=0.0, metadata={"help": "How much a step's cost counts in the choice, 0 to 8."})
    layers: list[str] | None = field(
        default=None, metadata={"help": "Stack(s) of blocks to choose from, where the model has several."}
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "lora, dora, adalora, series or parallel (bottleneck adapters), or none, which has whole layers "
            "train; lora by default, none with --method lisa or full."
        },
    )
    adalora_init_r: int | None = field(
        default=None, metadata={"help": "Rank that AdaLoRA begins with; 1.5 times lora_r, which is left, by default."}
    )
    adalora_warmup_steps: int | None = field(
        default=None, metadata={"help": "Steps before AdaLoRA's first allocation; a tenth of max_steps by default."}
    )
    adalora_final_steps: int | None = field(
        default=None, metadata={"help": "Steps after AdaLoRA's last allocation; three tenths by default."}
    )
    adalora_interval: int = field(default=1, metadata={"help": "Steps between two allocations of AdaLoRA."})
    bottleneck_size: int = field(default=256, metadata={"help": "Width of a bottleneck adapter."})
    bottleneck_non_linearity: str = field(default="relu", metadata={"help": "Non-linearity of a bottleneck adapter."})
    bottleneck_dropout: float = field(default=0.0, metadata={"help": "Dropout on a bottleneck adapter's input."})
    bottleneck_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules with bottleneck adapters; the paper's placement by default."}
    )
    data_files: list[str] | None = field(
        default=None,
        metadata={"help": "JSON, JSON-lines or CSV files: instruction, output and, if need be, input; or messages."},
    )
    task: list[str] | None = field(
        default=None, metadata={"help": "Tasks of the paper (boolq, gsm8k, commonsense, …), or word-problems."}
    )
    data_folder: str | None = field(default=None, metadata={"help": "The folder with the files of --task."})
    from_hub: bool = field(default=False, metadata={"help": "Load --task from the Hugging Face hub instead."})
    test_tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks whose test rows are left out of training, beside those of --task."}
    )
    num_train_problems: int = field(default=2000, metadata={"help": "Training problems of the built-in task."})
    num_test_problems: int = field(default=100, metadata={"help": "Held-out problems of the built-in task."})
    validation_size: int = field(
        default=120, metadata={"help": "Rows held out of data_files for the loss before and after; 0 for none."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Train into a folder that holds another run; its checkpoints go."}
    )
    max_train_seconds: float | None = field(
        default=None, metadata={"help": "End after this many seconds of steps (validation and checkpoints left out)."}
    )

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        if self.adapter is not None:
            check_choice("adapter", self.adapter, ADAPTERS)
        check_whole("greedy_steps", self.greedy_steps, at_least=1, why="a trial is a short training")
        if self.task is not None:
            self.task = [task.name for task in find_tasks(self.task)]
            if "word-problems" in self.task and len(self.task) > 1:
                raise ValueError(f"task={', '.join(self.task)} is not allowed: word-problems trains alone.")
        if self.test_tasks is not None:
            self.test_tasks = [task.name for task in find_tasks(self.test_tasks)]
        check_whole("num_train_problems", self.num_train_problems, at_least=1, why="there is nothing to train on else")
        check_whole("num_test_problems", self.num_test_problems, at_least=0, why="give 0 to ask none")
        if self.max_train_seconds is not None and not self.max_train_seconds > 0:
            raise ValueError(f"max_train_seconds={self.max_train_seconds} is no time to train in: give more than 0.")
        check_whole("validation_size", self.validation_size, at_least=0, why="give 0 to hold out none")

    def ist_config(self, seed: int) -> ISTConfig:
        """The method's hyperparameters, checked."""
        names = [field.name for field in dataclasses.fields(ISTConfig) if field.name != "seed"]
        options = {name: getattr(self, name) for name in names}
        for name in ("num_active_layers", "num_unsuppressed_layers"):
            options[name] = parse_layer_number(name, options[name])
        return ISTConfig(**options, seed=seed)


@dataclass(frozen=True)
class RunArguments:
    """All that a run is made from."""

    ist: ISTArguments
    ist_config: ISTConfig
    script: ScriptArguments
    training: SFTConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    recipe: str
    """Name of the recipe, or `ist`."""

    unused: tuple[str, ...] = ()
    """Flags of the command line that have no effect here."""

    given: tuple[str, ...] = ()
    """Names of the flags of the command line."""

    @property
    def selector(self) -> str | None:
        """Who chooses the layers, for `IST`; None where the Trainer trains alone."""
        return selector_of(self.ist)

    def peft_config(self) -> Any:
        """The adapter to put on the model, or None.

        Raises:
            ValueError: an option of the adapter is not allowed.
        """
        return adapter_config(self.ist, self.model, self.training.max_steps)


class OneLineParser(TrlParser):
    """TRL's parser; an error is one line that names the nearest flag, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with a message of one line."""
        raise ValueError(message)

    def flags(self) -> set[str]:
        """Every key that a recipe may have and every flag without its dashes."""
        return {action.dest for action in self._actions if action.dest != "help"}


DATACLASSES = (ISTArguments, ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
"""What the flags are made from."""


def make_parser() -> OneLineParser:
    """The parser of `ist train`, with the library's defaults."""
    return OneLineParser(cast("Any", DATACLASSES), prog="ist train", allow_abbrev=False)


def known_flags() -> set[str]:
    """Every flag of `ist train` without its dashes."""
    return make_parser().flags()


def parse_arguments(arguments: Sequence[str]) -> RunArguments:
    """Read flags and the recipe that `--recipe` (or `--config`, as TRL names it) gives; a flag overrides its recipe.

    Without a recipe, a model and data, the recipe is the quickstart.

    Raises:
        ValueError: a flag or key is unknown, a value is not allowed, or a recipe has what only the command line may.
    """
    parser = make_parser()
    parser.usage = "ist train [--recipe NAME_OR_FILE [--trust_recipe]] [--FLAG VALUE …]"
    recipe, trusted, rest = split_recipe(list(arguments))
    name = "ist"
    defaults: dict[str, Any] = {}
    if recipe is not None:
        file = find_recipe(recipe)
        name = run_name(file)
        defaults = read_recipe(file)
        check_keys(file.name, defaults, {*parser.flags(), *COMMAND_LINE_ONLY})
        check_safe(defaults, file.name, trusted=trusted)
        defaults = convert_values(file.name, defaults, parser, DATACLASSES)
    parser.set_defaults_with_config(**{"output_dir": f"runs/{name}", **device_defaults(rest, defaults), **defaults})
    _, unknown = parser.parse_known_args(rest)
    check_keys(
        "the command line", [flag.lstrip("-").split("=")[0].replace("-", "_") for flag in unknown], parser.flags()
    )
    try:
        parsed = parser.parse_args_into_dataclasses(rest, look_for_args_file=False)
    except ValueError as error:
        if "bf16" in str(error) and not bf16_is_supported():
            raise ValueError(
                "bf16 is on, and this machine has no GPU that computes in it: add --bf16 false."
            ) from error
        raise
    ist, script, training, model, mixture = parsed
    if str(training.resume_from_checkpoint).lower() in NO_RESUME:
        training.resume_from_checkpoint = None
    given = flag_names(rest)
    ist.adapter = settle_adapter(ist.method, ist.adapter, "adapter" in given)
    check_method(ist, model, training)
    check_local_model(model.model_name_or_path)
    check_numbers(training, model, ist)
    settle_checkpointing(ist, training, {*given, *defaults})
    unused = tuple(unused_flags(ist.method, ist.adapter, given))
    return RunArguments(
        ist, ist.ist_config(training.seed), script, training, model, mixture, name, unused, tuple(given)
    )


def check_local_model(name: str | None) -> None:
    """Raise ValueError where a model's name can only be a path, and nothing is there; the hub is not asked for it."""
    if not name or Path(name).expanduser().exists():
        return
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/"):
        raise ValueError(f"There is no model at {name}: give a folder that exists, or OWNER/NAME on the hub.")


def bf16_is_supported() -> bool:
    """Whether there is a GPU that computes in bfloat16."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def device_defaults(flags: Sequence[str], recipe: dict[str, Any]) -> dict[str, bool]:
    """What TRL leaves to the user to switch off on a machine without a (recent) GPU, or for fp16."""
    fp16 = bool(recipe.get("fp16")) or any(flag.split("=")[0] == "--fp16" for flag in flags)
    return {"dataloader_pin_memory": torch.cuda.is_available(), "bf16": bf16_is_supported() and not fp16}


def parse_layer_number(name: str, value: Any) -> int | float:
    """A count of layers from `8`, a fraction of them from `0.25`."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    raise ValueError(f"{name}={value!r} is not a number: write 8 for eight layers or 0.25 for a quarter of them.")
