"""A recipe may come from anybody: what it may set is a list, and nothing on it runs code, deletes or publishes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ...config import ISTConfig

__all__ = [
    "COMMAND_LINE_ONLY",
    "EVALUATION_KEYS",
    "METRIC_KEYS",
    "TRAINING_KEYS",
    "check_safe",
    "is_module",
    "without_authority",
]

COMMAND_LINE_ONLY = {
    "trust_remote_code": "runs code that comes with a model",
    "model_init_kwargs": "can run code that comes with a model",
    "use_kernels": "runs code from a hub",
    "task_folder": "runs code that comes with tasks",
    "metric_function": "runs code of its own",
    "env": "changes the environment of this process",
    "deepspeed": "reads a file that names code",
    "overwrite": "deletes another run",
    "resume_from_checkpoint": "reads and replaces the checkpoints of another run",
    "push_to_hub": "publishes the run",
    "hub_model_id": "publishes the run",
    "hub_token": "is a secret",
    "hub_strategy": "publishes the run",
    "hub_always_push": "publishes the run",
    "token": "is a secret",
}
"""What no recipe can set, a trusted one neither, and why."""


def split(names: str) -> frozenset[str]:
    """Names from a text."""
    return frozenset(names.split())


TRAINING_KEYS = frozenset(field.name for field in dataclasses.fields(ISTConfig)) | split(
    # the method
    "method fixed_layers greedy_steps greedy_min_gain layers "
    "num_focused_layers focused_rank focus_criterion focus_spread focus_min_depth focus_init "
    # the adapter
    "adapter adalora_init_r adalora_warmup_steps adalora_final_steps adalora_interval bottleneck_size "
    "bottleneck_non_linearity bottleneck_dropout bottleneck_sparsity "
    "bottleneck_target_modules use_peft lora_r lora_alpha lora_dropout "
    "lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora "
    # the model
    "model_name_or_path model_revision dtype attn_implementation load_in_8bit load_in_4bit bnb_4bit_quant_type "
    "use_bnb_nested_quant bnb_4bit_quant_storage eos_token pad_token router_aux_loss_coef "
    # the data
    "task test_tasks data_files validation_files data_folder from_hub num_train_problems num_test_problems "
    "validation_size metric labels metric_rows max_new_tokens "
    "dataset_name dataset_config dataset_train_split dataset_test_split dataset_text_field max_length "
    "truncation_mode shuffle_dataset packing packing_strategy padding_free pad_to_multiple_of eval_packing "
    "completion_only_loss assistant_only_loss train_sampling_strategy dataloader_drop_last "
    # the training
    "max_train_seconds per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type "
    "lr_scheduler_kwargs warmup_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "gradient_accumulation_steps average_tokens_across_devices max_grad_norm label_smoothing_factor "
    "neftune_noise_alpha loss_type seed data_seed full_determinism "
    # how it is computed
    "bf16 fp16 bf16_full_eval fp16_full_eval tf32 use_cpu gradient_checkpointing gradient_checkpointing_kwargs "
    "activation_checkpointing activation_offloading torch_compile use_liger_kernel use_cache "
    "torch_empty_cache_steps auto_find_batch_size "
    # when it is logged, judged and saved
    "run_name logging_strategy logging_steps logging_first_step eval_strategy eval_steps eval_delay eval_on_start "
    "per_device_eval_batch_size prediction_loss_only eval_accumulation_steps save_strategy save_steps "
    "save_only_model save_total_limit load_best_model_at_end metric_for_best_model greater_is_better"
)
"""Flags of `ist train` that anybody's recipe may set; `ISTConfig`'s are numbers and words, all of them harmless."""

EVALUATION_KEYS = split(
    "protocol tasks data_folder from_hub split data_files text_files metric labels limit batch_size max_length options "
    "extraction generation max_new_tokens num_beams do_sample temperature top_p top_k window stride num_fewshot seed "
    "dtype device"
)
"""Flags of `ist eval` that anybody's recipe may set."""

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Others are, or may be, code from a hub."""

OWN_RUN = "where the run is your own, take it out of that file and give it on the command line"

KEYWORDS = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs")
"""Keys whose values are keywords with numbers, texts and truth values."""

NAMES = ("task", "tasks", "test_tasks")
"""Keys whose values are names, and never files of tasks."""

MODULES = ("lora_target_modules", "lora_target_parameters", "lora_modules_to_save", "bottleneck_target_modules")
"""Keys whose values are names of modules. PEFT takes regular expressions too, and some of them never end."""


def check_safe(
    flags: Mapping[str, Any], name: str, allowed: frozenset[str] = TRAINING_KEYS, trusted: bool = False
) -> None:
    """Make sure that the flags of a recipe run no code, delete nothing and name no path outside of its folder.

    Args:
        flags: their names and values.
        name: of the recipe's file, for the message.
        allowed: what anybody's recipe may set.
        trusted: the recipe is the user's own (`--trust_recipe`): it may set all but `COMMAND_LINE_ONLY`.

    Raises:
        ValueError: it does; the message says which key, and to give it on the command line.
    """
    for key, value in flags.items():
        line = f"on the command line as --{key}"
        if key in COMMAND_LINE_ONLY:
            raise ValueError(f"{name} sets {key}, which {COMMAND_LINE_ONLY[key]}: a recipe cannot, give it {line}.")
        if is_code(key, value):
            raise ValueError(
                f"{name} sets {key} to {value!r}, which may run code from a hub: a recipe can set "
                f"{', '.join(ATTENTIONS)}, give another {line}."
            )
        if bad := next((item for item in flat(value) if is_flag(item)), None):
            raise ValueError(f"{name} sets {key} to {bad!r}, which looks like a flag: give it {line}.")
        if not trusted:
            check_untrusted(key, value, name, allowed)


def check_untrusted(key: str, value: Any, name: str, allowed: frozenset[str]) -> None:
    """Raise ValueError at a key or value that only the user's own recipe may have."""
    way_out = f"on the command line as --{key}, or add --trust_recipe if the recipe is your own."
    if key not in allowed:
        raise ValueError(f"{name} sets {key}, which is not among what anybody's recipe may set: give it {way_out}")
    if key in KEYWORDS and not (isinstance(value, Mapping) and all(is_plain(item) for item in value.values())):
        raise ValueError(f"{name} sets {key} to {value!r}, and not to keywords with plain values: give it {way_out}")
    for item in flat(value):
        if isinstance(item, str) and leaves_folder(item):
            raise ValueError(
                f"{name} sets {key} to {item!r}: paths in a recipe are relative, without `..` and without links that "
                f"lead out of this folder; give it {way_out}"
            )
        if key in NAMES and (not isinstance(item, str) or "/" in item or "\\" in item):
            raise ValueError(f"{name} sets {key} to {item!r}, which is not the name of a task: give it {way_out}")
        if key in MODULES and item is not None and not is_module(str(item)):
            raise ValueError(f"{name} sets {key} to {item!r}, which is not the name of a module: give it {way_out}")


def is_module(text: str) -> bool:
    """Whether a text is a name, which ends, and no regular expression."""
    return re.fullmatch(r"[\w.-]+", text) is not None


def flat(value: Any) -> list[Any]:
    """A value as a list, with the values of a mapping and the items of a list in a list."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return [value]
    return [item for entry in value for item in flat(entry)]


def is_code(key: str, value: Any) -> bool:
    """Whether a flag with this value may fetch code from a hub and run it."""
    return key == "attn_implementation" and value not in (None, *ATTENTIONS)


def is_plain(value: Any) -> bool:
    """Whether a value is neither a list nor a mapping."""
    return value is None or isinstance(value, (bool, int, float, str))


def is_flag(item: Any) -> bool:
    """Whether an item of a list would be read as a flag where the list becomes a part of a command line."""
    return isinstance(item, str) and re.match(r"-[^\d.]", item) is not None


def leaves_folder(text: str) -> bool:
    """Whether a text, read as a path or an address, leads out of the folder that it is used in."""
    text = re.sub(r"^(top|bottom):", "", text)  # a file of importance, in --fixed_layers
    if text.startswith("~") or "://" in text or "\0" in text:
        return True
    paths = PurePosixPath(text), PureWindowsPath(text)
    if any(path.is_absolute() or path.anchor or ".." in path.parts for path in paths):
        return True
    try:
        return not Path(text).resolve().is_relative_to(Path.cwd().resolve())
    except (OSError, RuntimeError):  # A name that is too long is no path; a link in a circle leads nowhere.
        return False


METRIC_KEYS = split("metric labels metric_rows max_new_tokens")
"""Flags of a metric that a recipe may set."""

WITHOUT_EFFECT = METRIC_KEYS | split("trust_recipe overwrite resume_from_checkpoint metric_function")
"""Flags that change nothing of a run that is done."""


def without_authority(arguments: Sequence[str], where: str) -> list[str]:
    """Arguments of `ist train` that a file recorded, without those that only a user can give.

    Flags that have no effect once a run is done are dropped; the others are refused.

    Raises:
        ValueError: they hold a flag that runs code or publishes.
    """
    if not isinstance(arguments, list) or not all(isinstance(argument, str) for argument in arguments):
        raise ValueError(f"{where} does not hold the arguments of `ist train` as a list of texts: train the run anew.")
    kept: list[str] = []
    key, dropping = "", False
    for argument in arguments:
        value: str | None = argument
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            key = name.replace("-", "_").removeprefix("no_")
            dropping = key in WITHOUT_EFFECT
            if key in COMMAND_LINE_ONLY and not dropping:
                raise ValueError(f"{where} sets {key}, which {COMMAND_LINE_ONLY[key]}: {OWN_RUN} as --{key}.")
            value = value if equals else None
        if key in MODULES and value is not None and not is_module(value):
            raise ValueError(f"{where} sets {key} to {value!r}, which is no name of a module: {OWN_RUN} as --{key}.")
        if value is not None and is_code(key, value):
            raise ValueError(f"{where} sets {key} to {value!r}, which may run code from a hub: {OWN_RUN} as --{key}.")
        if not dropping:
            kept.append(argument)
    return kept
