"""`ist train` ends with one line and status 2 where the weights become NaN or infinite; checkpoints stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from ist.cli.main import main
from ist.runs.checkpoints import checkpoints


@pytest.mark.parametrize("method", ["random", "peft", "even"])
def test_a_training_that_diverges(
    method: str, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rate is 0 in the first two steps of its warm-up and the last good checkpoint that of the first."""
    folder = tmp_path / "run"
    status = main([
        "train", "--model_name_or_path", str(tiny_model_folder), "--task=word-problems", "--num_train_problems=40",
        "--num_test_problems=0", "--output_dir", str(folder), "--method", method, "--max_steps=12",
        "--per_device_train_batch_size=4", "--gradient_checkpointing=false", "--use_cpu", "--lora_r=4",
        "--save_strategy=steps", "--save_steps=1", "--learning_rate=1e38", "--warmup_steps=11", "--optim=sgd",
        "--max_grad_norm=0", "--logging_steps=100",
    ])  # fmt: skip
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ist train: ")]
    assert status == 2
    (line,) = said
    assert line.startswith("ist train: error: The trained weights are NaN or infinite after step ")
    assert "lower learning rate" in line
    last = max(checkpoints(folder), key=lambda path: int(path.name.rpartition("-")[2]))
    assert line.endswith(f"They were not saved: the last good checkpoint is {last}.")
    assert not (folder / "adapter_model.safetensors").exists()
