"""The command line of `ist train`: TRL's own flags, and this library's beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from trl import ModelConfig, ScriptArguments, SFTConfig
from trl.scripts.utils import DatasetMixtureConfig

from ...config import ISTConfig, check_choice, check_whole
from ...experiments.data.tasks import find_tasks
from ..nearest import unknown_flag
from ..parsing import check_first
from ..recipes.files import check_keys, find_recipe, flag_names, read_recipe, run_name, split_recipe
from ..recipes.renamed import rename_arguments, rename_keys, warn_of_old_names
from ..recipes.safety import COMMAND_LINE_ONLY, METRIC_KEYS, check_safe
from ..recipes.values import convert_values
from ..sources import check_chat_template, check_local_model
from .adapter_files import check_adapter, check_names
from .adapters import adapter_config
from .defaults import DEFAULTS, check_mappings, check_reporters, settle_learning_rate
from .focus_flags import FocusArguments
from .help import HELP_TEXTS, print_help
from .methods import METHODS, check_checkpointing, check_method, selector_of, settle_adapter, unused_flags
from .metric_flags import MetricArguments
from .numbers import check_numbers, check_validation_size, count_held_out
from .options import field_docstrings, flags_of, values_of
from .parser import FlagParser

__all__ = ["ISTArguments", "RunArguments", "known_flags", "parse_arguments"]

NO_RESUME = ("false", "no", "none", "null", "")
"""Values of --resume_from_checkpoint, in small letters, that ask for a fresh start."""

OptionFlags = flags_of(ISTConfig, "OptionFlags", without=("seed",))
"""The flags of `ISTConfig`; its seed is the training's."""


@dataclass
class ISTArguments(FocusArguments, MetricArguments):
    """What `ist train` takes beside `ISTConfig`'s options and TRL's flags; these docstrings are the flags' help."""

    method: str = "ist"
    """Which layers train."""

    fixed_layers: str | None = None
    """The layers of `--method fixed`. Indices (`0,3,5`), names (`layers.0,layers.3`), `random` (drawn once), `top:FILE`
    or `bottom:FILE` (the most or least important by the scores in a JSON file or a run's history)."""

    greedy_steps: int = 20
    """Steps of each trial of `--method greedy`."""

    greedy_min_gain: float | None = None
    """Stop the greedy search where one more layer lowers the loss by less than this."""

    layers: list[str] | None = None
    """Stack(s) of blocks to choose from, where the model has several."""

    adapter: str | None = None
    """`lora`, `dora`, `adalora`, a bottleneck (`series`, `parallel`, `houlsby`, `pfeiffer`, `he`) or `none`. With
    `none` whole layers train. Also any type of PEFT's (`lokr`, `ia3`, …) with its defaults, or a JSON file with the
    configuration of one. Without it `lora`, and `none` with `--method lisa` or `full`."""

    adalora_init_r: int | None = None
    """Rank that AdaLoRA starts from; 1.5 times `lora_r`, the rank that it ends with, by default."""

    adalora_warmup_steps: int | None = None
    """Steps before AdaLoRA's first allocation; a tenth of `max_steps` by default."""

    adalora_final_steps: int | None = None
    """Steps after AdaLoRA's last allocation; three tenths of `max_steps` by default."""

    adalora_interval: int = 1
    """Steps between two allocations of AdaLoRA."""

    bottleneck_size: int = 256
    """Width of a bottleneck adapter."""

    bottleneck_non_linearity: str = "relu"
    """Non-linearity of a bottleneck adapter."""

    bottleneck_dropout: float = 0.0
    """Dropout on a bottleneck adapter's input."""

    bottleneck_sparsity: float = 0.0
    """Fraction of a bottleneck adapter's weights that are pruned before training."""

    bottleneck_target_modules: list[str] | None = None
    """Modules that get bottleneck adapters; the paper's placement by default."""

    data_files: list[str] | None = None
    """Files of rows: .json, .jsonl, .csv, .tsv or .parquet, with instruction, output and, if need be, input; or
    messages; or prompt and completion."""

    validation_files: list[str] | None = None
    """Files in the forms of `--data_files` for the loss before and after, in place of rows held out."""

    task: list[str] | None = None
    """Tasks of the paper (`boolq`, `gsm8k`, `commonsense`, …), or `word-problems`, which is built in."""

    data_folder: str | None = None
    """The folder with the files of `--task`."""

    from_hub: bool = False
    """Load `--task` from the Hugging Face hub instead."""

    test_tasks: list[str] | None = None
    """Tasks whose test rows are left out of training, beside those of `--task`."""

    num_train_problems: int = 2000
    """Training problems of the built-in task."""

    num_test_problems: int = 100
    """Held-out problems of the built-in task."""

    validation_size: str | None = None
    """Rows held out for the loss before and after: a count (120), a fraction (0.1), or 0 for none; by default a tenth
    of the rows, at most 120."""

    overwrite: bool = False
    """Train into a folder that holds another run. Its checkpoints are removed."""

    max_train_seconds: float | None = None
    """End after this many seconds of steps; validation and checkpoints do not count."""

    def __post_init__(self) -> None:
        self.check_metric()
        self.check_focus()
        check_choice("method", self.method, METHODS)
        if self.adapter is not None:
            check_adapter(self.adapter)
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
        check_validation_size(self.validation_size)

    def num_held_out(self, num_rows: int) -> int:
        """How many of the training rows are held out for validation.

        Raises:
            ValueError: none would be left to train on.
        """
        return count_held_out(self.validation_size, num_rows)


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

    named: frozenset[str] = frozenset()
    """Names of the flags that the command line or the recipe gives."""

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


DATACLASSES = (ISTArguments, OptionFlags, ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
"""What the flags are made from."""


def make_parser() -> FlagParser:
    """The parser of `ist train`, with the library's defaults."""
    parser = FlagParser(DATACLASSES, {**field_docstrings(ISTConfig), **field_docstrings(ISTArguments), **HELP_TEXTS})
    parser.set_defaults_with_config(**DEFAULTS)
    return parser


def known_flags() -> set[str]:
    """Every flag of `ist train` without its dashes."""
    return make_parser().flags()


def parse_arguments(arguments: Sequence[str], without_metric: bool = False) -> RunArguments:
    """Read flags and the recipe that `--recipe` (or `--config`, as TRL names it) gives; a flag overrides its recipe.

    Without a recipe, a model and data, the recipe is the quickstart.

    Args:
        arguments: as they were typed.
        without_metric: leave out what the recipe says of a metric, which a finished run needs no more.

    Raises:
        ValueError: a flag or key is unknown, a value is not allowed, or a recipe has what only the command line may.
    """
    check_first(arguments, "train")
    parser = make_parser()
    print_help(parser, arguments)
    renamed, said = rename_arguments(arguments)
    warn_of_old_names("the command line", said)
    recipe, trusted, rest = split_recipe(renamed)
    name, defaults = ("ist", {}) if recipe is None else recipe_values(recipe, parser, trusted)
    if without_metric:
        defaults = {key: value for key, value in defaults.items() if key not in METRIC_KEYS}
    parser.set_defaults_with_config(**{"output_dir": f"runs/{name}", **device_defaults(rest, defaults), **defaults})
    ist, options, script, training, model, mixture = parse_flags(parser, rest)
    if str(training.resume_from_checkpoint).lower() in NO_RESUME:
        training.resume_from_checkpoint = None
    given = flag_names(rest)
    named = frozenset({*given, *defaults})
    ist.adapter = settle_adapter(ist.method, ist.adapter, "adapter" in given)
    if not trusted and "adapter" not in given:
        check_names(ist.adapter)
    check_method(ist, model, training)
    check_local_model(model.model_name_or_path)
    check_chat_template(training.chat_template_path)
    check_reporters(training.report_to)
    check_numbers(training, model, ist)
    # Only what was named: options that were not are the preset's.
    chosen = {option: value for option, value in values_of(options, ISTConfig).items() if option in named}
    config = ISTConfig(**chosen, seed=training.seed)
    check_checkpointing(ist.method, config.recompute, training)
    settle_learning_rate(ist.adapter, training, named)
    unused = tuple(unused_flags(ist.method, ist.adapter, given))
    return RunArguments(ist, config, script, training, model, mixture, name, unused, tuple(given), named)


def recipe_values(recipe: str, parser: FlagParser, trusted: bool) -> tuple[str, dict[str, Any]]:
    """The name of a recipe's runs, and its values as flags would give them.

    Raises:
        ValueError: there is no such recipe, a key or value is not allowed, or only the command line may give it.
    """
    file = find_recipe(recipe)
    values, said = rename_keys(read_recipe(file))
    warn_of_old_names(file.name, said)
    check_keys(file.name, values, {*parser.flags(), *COMMAND_LINE_ONLY})
    check_safe(values, file.name, trusted=trusted)
    return run_name(file), convert_values(file.name, values, parser, DATACLASSES)


def parse_flags(parser: FlagParser, flags: Sequence[str]) -> tuple[Any, ...]:
    """An object for each of `DATACLASSES`.

    Raises:
        ValueError: a flag is unknown, or a value is not allowed.
    """
    namespace, unknown = parser.parse_known_args(flags)
    if unknown:
        raise unknown_flag(unknown[0], parser.flags(), "ist train --help-all")
    check_mappings(vars(namespace), SFTConfig._VALID_DICT_FIELDS)
    try:
        return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except ValueError as error:
        if "bf16" in str(error) and not bf16_is_supported():
            raise ValueError(
                "bf16 is on, and this machine has no GPU that computes in it: add --bf16 false."
            ) from error
        raise


def bf16_is_supported() -> bool:
    """Whether there is a GPU that computes in bfloat16."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def device_defaults(flags: Sequence[str], recipe: dict[str, Any]) -> dict[str, bool]:
    """What TRL leaves to the user to switch off on a machine without a (recent) GPU, or for fp16."""
    fp16 = bool(recipe.get("fp16")) or any(flag.split("=")[0] == "--fp16" for flag in flags)
    return {"dataloader_pin_memory": torch.cuda.is_available(), "bf16": bf16_is_supported() and not fp16}
