"""A keyword that nobody takes is named in one line, with the nearest one that somebody does."""

from __future__ import annotations

import re
from typing import Any

import pytest
from peft import LoraConfig

from ist import IST, ISTConfig, SparseTuner, focus, greedy_layers, layer_scores
from ist.config.keywords import nearest
from ist.focusing import find_focus
from tests.helpers.tiny import tiny_batches, tiny_llama, tiny_lora

LORA = LoraConfig(r=2, target_modules=["q_proj"])

CALLS: list[tuple[Any, tuple[Any, ...], type[Exception], str, str]] = [
    (focus, (None, LORA, []), TypeError, "n_layers", "num_layers"),
    (focus, (None, LORA, []), TypeError, "lyers", "layers"),
    (find_focus, (None, LORA, []), TypeError, "score", "scores"),
    (layer_scores, (None, LORA, []), TypeError, "n_batches", "num_batches"),
    (layer_scores, (None, LORA, []), TypeError, "criteria", "criterion"),
    (IST, (), ValueError, "n_layers", "num_active_layers"),
    (IST, (), ValueError, "num_active", "num_active_layers"),
    (IST, (), ValueError, "probe_data", "probe_dataset"),
    (IST, (), ValueError, "select", "selector"),
    (SparseTuner, (None,), ValueError, "n_active", "num_active_layers"),
    (SparseTuner, (None,), ValueError, "probe_batch", "probe_batches"),
    (SparseTuner, (None, ISTConfig()), ValueError, "loss_fn", "loss_function"),
    (ISTConfig, (), TypeError, "betta", "beta"),
    (ISTConfig.authors, (), ValueError, "intervals", "update_interval"),
]


@pytest.mark.parametrize(("call", "args", "kind", "given", "meant"), CALLS)
def test_an_unknown_keyword(call: Any, args: tuple[Any, ...], kind: type[Exception], given: str, meant: str) -> None:
    with pytest.raises(kind) as error:
        call(*args, **{given: 4})
    message = str(error.value)
    what = "ISTConfig" if call == ISTConfig.authors else call.__name__
    assert message.startswith(f"Unknown option {given} of {what}: did you mean {meant}? Its options are ")
    assert "\n" not in message


def test_one_that_is_like_no_other_is_said_with_all() -> None:
    with pytest.raises(
        TypeError, match="Unknown option zzz of focus: its options are model, peft_config, batches, num"
    ):
        focus(tiny_llama(2), LORA, zzz=1)


def test_several_unknown_keywords() -> None:
    with pytest.raises(
        ValueError, match=re.escape("Unknown option betta, seeds, x of IST: did you mean beta and seed?")
    ):
        IST(betta=1, seeds=2, x=3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: focus(tiny_llama(2), LORA, tiny_batches(1), layers=4),  # type: ignore[arg-type]
        lambda: layer_scores(tiny_llama(2), LORA, tiny_batches(1), layers=4),  # type: ignore[arg-type]
        lambda: SparseTuner(tiny_lora(2), layers=4),  # type: ignore[arg-type]
        lambda: SparseTuner(tiny_llama(2), selector="lisa", layers=4),  # type: ignore[arg-type]
    ],
)
def test_a_number_of_layers_given_as_layers(call: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"layers=4 is not a name .*: this model has .*layers' \(2 blocks\)\. How many .* num_layers of",
    ):
        call()


def test_a_number_of_layers_is_refused_before_there_is_a_model() -> None:
    with pytest.raises(ValueError, match=r"layers=4 is not .*: give one, or None\. How many layers .* num_active"):
        IST(layers=4)  # type: ignore[arg-type]


def test_the_greedy_search_says_its_own_keywords_too() -> None:
    needed: dict[str, Any] = {"train_batches": [], "validation_batches": [], "num_steps": 1, "learning_rate": 0.1}
    with pytest.raises(ValueError, match=r"Unknown option min_gains of greedy_layers: did you mean min_gain\?"):
        greedy_layers(tiny_lora(2), **needed, min_gains=0.1)


def test_a_count_is_meant_by_a_count() -> None:
    allowed = ["layers", "num_active_layers", "seed"]
    assert nearest("n_layers", allowed) == nearest("num_layers", allowed) == "num_active_layers"
    assert nearest("layer", allowed) == "layers"
    assert nearest("n_seed", allowed) == "seed"
    assert nearest("zzz", allowed) is None
    others = ["num_focused_layers", "num_train_epochs", "max_steps", "dataloader_num_workers", "padding_free"]
    assert nearest("num_steps", others) == "max_steps"  # a count of something else is not meant
    assert nearest("num_workers", others) == "dataloader_num_workers"
    assert nearest("no_padding_fre", others) == "padding_free"
