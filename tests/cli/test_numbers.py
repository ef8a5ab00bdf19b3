"""Numbers that cannot be are refused before anything loads."""

from __future__ import annotations

from pathlib import Path

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
    with pytest.raises(ValueError, match="is not allowed: give a number from 0 to"):
        parse_arguments([*FLAGS, flag])


@pytest.mark.parametrize("name", ["lora_dropout", "bottleneck_dropout", "adam_beta1", "adam_beta2"])
def test_a_share_of_1_that_leaves_nothing_to_learn(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=1.0 is not allowed: give a number from 0 to below 1"):
        parse_arguments([*FLAGS, f"--{name}=1"])
    parse_arguments([*FLAGS, f"--{name}=0.999"])


@pytest.mark.parametrize(
    "flag", ["--max_grad_norm=0", "--weight_decay=0", "--learning_rate=1", "--num_train_epochs=0.5"]
)
def test_a_number_that_can_be(flag: str) -> None:
    parse_arguments([*FLAGS, flag])


def test_an_object_in_the_place_of_a_files_name(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model_name_or_path: m\ndata_files: {a: b}\nbf16: false\n")
    with pytest.raises(ValueError, match=r"data_files to \{'a': 'b'\}: give a text, or a list of such"):
        parse_arguments(["--recipe", str(tmp_path / "r.yaml")])


def test_an_adapter_of_another_kind_of_model_is_refused() -> None:
    with pytest.raises(ValueError, match="lora_task_type='SEQ_CLS' is not what is trained"):
        parse_arguments([*FLAGS, "--lora_task_type=SEQ_CLS"])


@pytest.mark.parametrize("seed", [2**32, 10**20])
def test_a_seed_that_no_generator_takes(seed: int) -> None:
    with pytest.raises(ValueError, match=r"seed=.* is not allowed: give a whole number from 0 to 4294967295"):
        parse_arguments([*FLAGS, f"--seed={seed}"])
