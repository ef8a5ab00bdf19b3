"""The command line of `ist eval`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from ...experiments.evaluation import GREEDY, PAPER, PROTOCOLS, EvaluationSettings, Generation
from ...experiments.evaluation.extraction import EXTRACTIONS
from ...experiments.evaluation.likelihood import OPTION_FORMS
from ...experiments.evaluation.metrics import METRICS
from ..metric import check_marks
from ..parsing import OneLineParser

__all__ = ["evaluation_settings", "known_eval_flags", "parse_eval_arguments"]

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")


def parse_eval_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the flags.

    Raises:
        ValueError: a flag is unknown, or flags do not go together.
    """
    flags = eval_parser().parse_args(arguments)
    if not flags.model_name_or_path and not flags.adapter:
        raise ValueError(
            "No model given: --model_name_or_path takes a folder, a model of the Hugging Face hub, or smollm2-135m for "
            "the quickstart's; --adapter alone takes the model that the adapter names."
        )
    sources = {"--tasks": flags.tasks, "--data_files": flags.data_files, "--text_files": flags.text_files}
    if not any(sources.values()):
        raise ValueError(f"Nothing to evaluate on: give {', '.join(sources)}, or several of them.")
    if sources["--text_files"] and flags.protocol != "loss":
        raise ValueError("--text_files has a loss alone: add --protocol loss.")
    if sources["--data_files"] and flags.protocol in ("likelihood", "lm-eval"):
        raise ValueError(f"--data_files has no options for {flags.protocol}: take --protocol generate or loss.")
    marks = [name for name in ("metric", "labels", "metric_function") if getattr(flags, name)]
    if marks and (flags.protocol != "generate" or not flags.data_files):
        raise ValueError(f"--{marks[0]} marks generated answers to --data_files: take both, with --protocol generate.")
    check_marks(flags.metric, flags.labels, flags.metric_function)
    return flags


class HelpLayout(argparse.HelpFormatter):
    """Flags with `VALUE` after them, since the help says which, and not their own names in capitals."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if action.type is int else "X" if action.type is float else "VALUE"


PROTOCOL_HELP = (
    "generate: answers are generated and marked; likelihood: the likeliest option is the answer; loss: nats a token; "
    "lm-eval: by lm-evaluation-harness (default: generate)"
)


def known_eval_flags() -> set[str]:
    """The names of the flags of `ist eval`."""
    return {action.dest for action in eval_parser()._actions}


def eval_parser() -> OneLineParser:
    """All flags."""
    parser = OneLineParser(
        prog="ist eval",
        usage="ist eval [--model_name_or_path MODEL] [--adapter FOLDER] --tasks NAME … | --data_files FILE … [--FLAG]",
        formatter_class=HelpLayout,
        allow_abbrev=False,
        description="Evaluate a model, with or without an adapter, on tasks, your own rows or plain text.",
    )
    add = parser.add_argument_group("model").add_argument
    add("--model_name_or_path", help="a folder, a model of the hub, or smollm2-135m (default: the adapter's)")
    add("--adapter", help="a folder with adapter_config.json, such as a run's --output_dir, or a name on the hub")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as saved)")
    add("--device", help="cuda, cpu, mps … (default: the GPU where there is one)")
    add("--trust_remote_code", action="store_true", help="run code that comes with a model")

    add = parser.add_argument_group("what it is evaluated on").add_argument
    add("--tasks", nargs="+", help="the paper's tasks, word-problems, or tasks of lm-evaluation-harness")
    add("--data_folder", help="the folder with the tasks' files")
    add("--from_hub", action="store_true", help="load the tasks from the Hugging Face hub")
    add("--split", default="test", choices=("test", "validation", "train"), help="of the tasks (default: test)")
    add("--data_files", nargs="+", help="files of instructions or chats: answered and marked, or for the loss")
    add("--metric", choices=METRICS, help="how answers to --data_files are marked (default: exact_match)")
    add("--labels", nargs="+", help="for label_accuracy (default: the different answers of a file)")
    add("--metric_function", help="a metric of your own, FILE.py:FUNCTION or MODULE:FUNCTION: f(response, expected)")
    add("--text_files", nargs="+", help="files of plain text, for the loss")
    add("--limit", type=int, help="rows of each task, from the first (default: all)")

    add = parser.add_argument_group("how, and where the results go").add_argument
    add("--protocol", choices=PROTOCOLS, default="generate", help=PROTOCOL_HELP)
    add("--output_dir", help="takes ist_eval.json and the answers (default: runs/eval, runs/eval-2, …)")
    add("--batch_size", type=int, default=32, help="sequences computed at once (default: 32)")
    add("--max_length", type=int, help="most tokens of a sequence; a longer prompt loses its beginning")
    add("--seed", type=int, default=42, help="of what is drawn at random (default: 42)")

    add = parser.add_argument_group("one protocol in detail").add_argument
    add("--options", choices=OPTION_FORMS, default="label", help="likelihood of the label, or of the option's text")
    add("--extraction", choices=EXTRACTIONS, help="how an answer is found (default: careful)")
    add("--generation", choices=("greedy", "paper"), default="greedy", help="paper: four beams, extraction paper")
    add("--max_new_tokens", type=int, help="tokens of an answer (default: 32 or 256, by task)")
    add("--num_beams", type=int, help="beams of the search (default: 1; 4 with --generation paper)")
    add("--do_sample", action="store_true", help="draw tokens at random, by the next three flags")
    add("--temperature", type=float, help="divides the logits")
    add("--top_p", type=float, help="draw from the likeliest tokens that together have this probability")
    add("--top_k", type=int, help="draw from so many of the likeliest tokens")
    add("--window", type=int, default=1024, help="tokens of a window of plain text (default: 1024)")
    add("--stride", type=int, help="tokens from one window to the next (default: a window)")
    add("--num_fewshot", type=int, help="examples in the prompt, for lm-eval")
    add("--task_folder", help="a folder with tasks for lm-eval, beside its own")
    return parser


def evaluation_settings(flags: argparse.Namespace) -> EvaluationSettings:
    """The settings that the flags give.

    Raises:
        ValueError: a value is not allowed.
    """
    names = ("batch_size", "max_length", "options", "max_new_tokens", "window", "stride", "num_fewshot", "task_folder")
    paper = flags.generation == "paper"
    return EvaluationSettings(
        **{name: getattr(flags, name) for name in names},
        limit=flags.limit,
        metric=flags.metric or "exact_match",
        labels=tuple(flags.labels or ()),
        seed=flags.seed,
        generation=generation(flags),
        extraction=flags.extraction or ("paper" if paper else "careful"),
    )


def generation(flags: argparse.Namespace) -> Generation:
    """The preset with single flags over it."""
    base = PAPER if flags.generation == "paper" else GREEDY
    drawn = {name: getattr(flags, name) for name in ("temperature", "top_p", "top_k")}
    without_effect = [f"--{name}" for name, value in drawn.items() if value is not None and not flags.do_sample]
    if without_effect:
        logger.warning("%s without --do_sample: no effect, since nothing is drawn.", ", ".join(without_effect))
    given: dict[str, Any] = {name: value for name, value in drawn.items() if value is not None}
    values = {**vars(base), **given, "do_sample": flags.do_sample}
    return Generation(**{**values, "num_beams": base.num_beams if flags.num_beams is None else flags.num_beams})
