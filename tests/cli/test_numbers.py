"""Numbers that cannot be are refused before anything loads."""

from __future__ import annotations

import pytest

from ist.cli.train.arguments import parse_arguments

FLAGS = ["--model_name_or_path=x", "--task=word-problems", "--bf16=false", "--use_cpu"]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1"])
@pytest.mark.parametrize(
    "name",
    ["learning_rate", "weight_decay", "max_grad_norm", "label_smoothing_factor", "adam_beta1", "adam_epsilon",
     "num_train_epochs", "lora_dropout", "bottleneck_dropout"],
)  # fmt: skip
def test_a_number_that_cannot_be(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed: give a") as error:
        parse_arguments([*FLAGS, f"--{name}={value}"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["--label_smoothing_factor=1.5", "--lora_dropout=2", "--adam_beta2=1.1"])
def test_a_share_above_1(flag: str) -> None:
    with pytest.raises(ValueError, match="is not allowed: give a number from 0 to 1"):
        parse_arguments([*FLAGS, flag])


@pytest.mark.parametrize(
    "flag", ["--max_grad_norm=0", "--weight_decay=0", "--learning_rate=1", "--num_train_epochs=0.5"]
)
def test_a_number_that_can_be(flag: str) -> None:
    parse_arguments([*FLAGS, flag])
