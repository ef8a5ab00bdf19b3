"""`IST` in the Trainer: the promise of one line, with everything that people switch on beside it."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import ist
from ist import IST, ISTConfig, RandomSelector, read_history
from ist.runs.history import HISTORY_FILE
from tests.helpers.tiny import layer_of, moved_layers, snapshot, tiny_llama, tiny_lora, tiny_rows, traces


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **options})


def make_trainer(folder: Path, *callbacks: TrainerCallback, model: Any = None, data: Any = None, **options: Any) -> Any:
    return Trainer(
        model=tiny_lora(lora_dropout=0.1) if model is None else model,
        args=arguments(folder, **options),
        train_dataset=tiny_rows(96) if data is None else data,  # pyright: ignore[reportArgumentType]
        eval_dataset=tiny_rows(8, seed=9),  # pyright: ignore[reportArgumentType]
        callbacks=list(callbacks),
    )


class Watch(TrainerCallback):
    """Which layers moved at each step, beside those that were chosen."""

    def __init__(self, ist: IST) -> None:
        self._ist = ist
        self.chosen: list[set[int]] = []
        self.moved: list[set[int | None]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert self._ist.tuner
        self.chosen.append(set(self._ist.tuner.active_layers or ()))
        self._before = snapshot(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.moved.append(moved_layers(self._before, snapshot(model)))


def test_algorithm_1_of_the_paper(tmp_path: Path) -> None:
    """The listing as printed, but for names that no longer exist: `get_peft_model` takes a model and a configuration,
    the Trainer takes data, and its `fit` is called `train`."""
    model, config, data = tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"]), tiny_rows(32)
    args = arguments(tmp_path)
    before_import = set(dir(ist))

    import peft, transformers  # noqa: E401, I001
    from ist import IST

    # initialize the pre-trained model and PEFT modules
    peft_model = peft.get_peft_model(model, config)
    # initialize IST as callback function
    ist_callback = IST()
    # adopt IST in Trainer with one modification
    trainer = transformers.Trainer(model=peft_model, callbacks=[ist_callback], args=args, train_dataset=data)  # pyright: ignore[reportArgumentType]
    untrained = snapshot(peft_model)
    trainer.train()

    assert "IST" in before_import
    assert moved_layers(untrained, snapshot(peft_model)) == {0, 1, 2, 3}
    assert ist_callback.tuner is not None
    assert ist_callback.tuner.last_update is not None
    assert any(score != 0 for score in ist_callback.tuner.last_update.importance)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3, "max_steps": 6},
        {"bf16": True},
        {"max_grad_norm": 0.1},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 16},
        {"eval_strategy": "epoch"},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"neftune_noise_alpha": 5.0},
        {"label_smoothing_factor": 0.1},
        {"dataloader_num_workers": 1},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning", "ignore:None of the inputs:UserWarning")
def test_only_the_chosen_layers_move_whatever_else_is_on(tmp_path: Path, options: dict[str, Any]) -> None:
    model = tiny_lora(lora_dropout=0.1)
    before = traces(model)
    callback = IST(num_active_layers=2, update_interval=3)
    watch = Watch(callback)
    trainer = make_trainer(tmp_path, callback, watch, model=model, **options)
    trainer.train()
    assert len(watch.moved) == trainer.state.global_step == (6 if "max_steps" in options else 12)
    assert all(len(chosen) == 2 for chosen in watch.chosen)
    assert watch.moved == watch.chosen
    assert traces(model)["requires_grad"] == before["requires_grad"]
    assert traces(model)["scaling"] == before["scaling"]
    assert all(hooks == before["hooks"][name] for name, hooks in traces(model)["hooks"].items() if "lora" in name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 autocast with a gradient scaler needs a GPU")
def test_fp16(tmp_path: Path) -> None:
    callback = IST(num_active_layers=2, update_interval=3)
    watch = Watch(callback)
    make_trainer(tmp_path, callback, watch, fp16=True, use_cpu=False).train()
    assert all(moved <= chosen for moved, chosen in zip(watch.moved, watch.chosen, strict=True))
    assert any(watch.moved)


def test_a_step_is_an_optimizer_step(tmp_path: Path) -> None:
    """With accumulation the choice stays for all the micro-batches of a step."""
    make_trainer(tmp_path, IST(update_interval=2), gradient_accumulation_steps=4, max_steps=5).train()
    steps = [event["step"] for event in read_history(tmp_path) if event["event"] == "step"]
    updates = [event["step"] for event in read_history(tmp_path) if event["event"] == "importance"]
    assert (steps, updates) == ([1, 2, 3, 4, 5], [2, 4])


def test_probes_with_mu_0_change_no_bit_of_a_random_run(tmp_path: Path) -> None:
    runs = []
    for name, callback in (("ist", IST(mu=0, update_interval=2)), ("random", IST(selector="random"))):
        trainer = make_trainer(tmp_path / name, callback, seed=3)
        trainer.train()
        runs.append((snapshot(trainer.model), [log["loss"] for log in trainer.state.log_history if "loss" in log]))
        assert any(event["event"] == "importance" for event in read_history(tmp_path / name)) == (name == "ist")
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(runs[0][0][name], runs[1][0][name]) for name in runs[0][0])


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from tiny_rows(64)


def hugging_face_rows() -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list([{name: value.tolist() for name, value in row.items()} for row in tiny_rows(64)])


@pytest.mark.parametrize(
    "data",
    [
        lambda: tiny_rows(64),
        lambda: hugging_face_rows().with_format("torch"),
        Stream,
        lambda: hugging_face_rows().to_iterable_dataset().with_format("torch"),
    ],
    ids=["map-style", "datasets", "iterable", "streaming"],
)
def test_every_kind_of_dataset_is_measured_on(tmp_path: Path, data: Any) -> None:
    make_trainer(tmp_path, IST(update_interval=2), data=data(), max_steps=6).train()
    updates = [event for event in read_history(tmp_path) if event["event"] == "importance"]
    assert [update["step"] for update in updates] == [2, 4, 6]
    assert all(len(set(update["losses"])) == 3 for update in updates)


def test_a_probe_dataset_of_ones_own(tmp_path: Path) -> None:
    seen = []

    def loss_function(model: Any, batch: Any) -> torch.Tensor:
        seen.append(batch["input_ids"])
        return model(**batch).loss

    probes = tiny_rows(4, seed=77)
    make_trainer(
        tmp_path, IST(update_interval=6, probe_dataset=probes, probe_batch_size=2, loss_function=loss_function)
    ).train()
    known = [tuple(row["input_ids"].tolist()) for row in probes]
    assert len(seen) == 6
    assert {ids.shape[0] for ids in seen} == {2}
    assert all(tuple(row.tolist()) in known for ids in seen for row in ids)


@pytest.mark.parametrize("restore_flag", [False, True])
@pytest.mark.parametrize("stream", [False, True], ids=["map-style", "iterable"])
def test_resume_equals_an_uninterrupted_run_to_the_bit(tmp_path: Path, stream: bool, restore_flag: bool) -> None:
    def trainer(name: str, **options: Any) -> Any:
        return make_trainer(
            tmp_path / name, IST(update_interval=3, mu=300), data=Stream() if stream else tiny_rows(64),
            save_strategy="steps", save_steps=6, restore_callback_states_from_checkpoint=restore_flag, **options,
        )  # fmt: skip

    whole = trainer("whole")
    whole.train()
    killed = trainer("killed")
    killed.add_callback(Stop(at=8))
    killed.train()
    resumed = trainer("killed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-6"))

    expected, got = snapshot(whole.model), snapshot(resumed.model)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    history = [
        [event for event in read_history(tmp_path / name) if event["event"] in ("step", "importance")]
        for name in ("whole", "killed")
    ]
    assert history[0] == history[1]
    assert len(history[0]) == 12 + 4


class Stop(TrainerCallback):
    def __init__(self, at: int) -> None:
        self._at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self._at


def test_resuming_with_the_flag_and_an_argument_that_no_checkpoint_holds_is_refused(tmp_path: Path) -> None:
    def trainer() -> Any:
        return make_trainer(
            tmp_path, IST(loss_function=lambda model, batch: model(**batch).loss), save_strategy="steps", save_steps=6,
            restore_callback_states_from_checkpoint=True,
        )  # fmt: skip

    trainer().train()
    with pytest.raises(ValueError, match="without loss_function, which no checkpoint can hold: leave that flag off"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_resuming_a_run_without_ist_warns_and_saves(tmp_path: Path) -> None:
    make_trainer(tmp_path, save_strategy="steps", save_steps=6).train()
    callback = IST(update_interval=3)
    trainer = make_trainer(tmp_path, callback, save_strategy="steps", save_steps=6)
    with pytest.warns(UserWarning, match="holds no IST state of that step"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["IST"]["tuner"]["num_steps"] == 12


@pytest.mark.parametrize(
    ("callback", "model", "message"),
    [
        (IST(mu=5), lambda: tiny_lora(), r"other hyperparameters \(mu was 10.0 and is 5\)"),
        (IST(), lambda: tiny_lora(5), "resume with the model"),
    ],
)
def test_resuming_another_run_is_refused(tmp_path: Path, callback: IST, model: Any, message: str) -> None:
    make_trainer(tmp_path, IST(), save_strategy="steps", save_steps=6).train()
    lines = (tmp_path / HISTORY_FILE).read_text()
    trainer = make_trainer(tmp_path, callback, model=model())
    trainer._load_from_checkpoint = lambda *_, **__: None  # the weights of another model are not this test's matter
    trainer._load_optimizer_and_scheduler = lambda *_, **__: None
    before = traces(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert traces(trainer.model)["hooks"] == before["hooks"]
    assert (tmp_path / HISTORY_FILE).read_text() == lines


def test_a_second_train_begins_afresh(tmp_path: Path) -> None:
    callback = IST(update_interval=2)
    model = tiny_lora()
    before = traces(model)
    trainer = make_trainer(tmp_path, callback, model=model, max_steps=4)
    trainer.train()
    first = read_history(tmp_path)
    trainer.train()
    second = read_history(tmp_path)
    assert [e["active"] for e in first if e["event"] == "step"] == [e["active"] for e in second if e["event"] == "step"]
    assert [e["step"] for e in second if e["event"] == "step"] == [1, 2, 3, 4]
    assert traces(model)["hooks"] == before["hooks"]


class Fail(TrainerCallback):
    """Raises in one hook at the third step."""

    def __init__(self, hook: str) -> None:
        def fail(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= 2:
                raise RuntimeError("as planned")

        setattr(self, hook, fail)


@pytest.mark.parametrize("hook", ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"])
def test_after_an_exception_the_model_is_as_peft_made_it(tmp_path: Path, hook: str) -> None:
    model = tiny_lora()
    before = traces(model)
    callback = IST(update_interval=1)
    trainer = make_trainer(tmp_path, callback, Fail(hook), model=model)
    with pytest.raises(RuntimeError, match="as planned"):
        trainer.train()
    after = traces(model)
    assert [after[key] for key in ("requires_grad", "scaling", "disabled")] == [
        before[key] for key in ("requires_grad", "scaling", "disabled")
    ]
    callback.close()
    assert traces(model)["hooks"] == before["hooks"]


def test_metrics_reach_the_reporters_and_the_log(tmp_path: Path) -> None:
    """Reporters come before users' callbacks in the Trainer's list, so what a callback adds to a log misses them."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    callback = IST(update_interval=2)
    trainer = make_trainer(tmp_path, callback, report_to="tensorboard")
    order = [type(cb).__name__ for cb in trainer.callback_handler.callbacks]
    assert order.index("TensorBoardCallback") < order.index("IST")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        trainer.train()
    files = sorted(tmp_path.rglob("events.out.tfevents.*"))
    accumulator = event_accumulator.EventAccumulator(str(files[0].parent))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    assert "train/ist/importance_max" in tags or "ist/importance_max" in tags
    last = [log for log in trainer.state.log_history if "loss" in log][-1]
    assert last["ist/importance_max"] >= last["ist/importance_min"]
    assert last["ist/probe_loss"] > 0
    logged = [event for event in read_history(tmp_path) if event["event"] == "log"]
    assert logged[0]["loss"] == next(log["loss"] for log in trainer.state.log_history if "loss" in log)


def test_reordering_skips_and_repeats_no_callback(tmp_path: Path) -> None:
    calls: list[str] = []

    def counting(name: str) -> TrainerCallback:
        class Counting(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                calls.append(name)

        return Counting()

    trainer = make_trainer(tmp_path, counting("a"), counting("b"), IST(), counting("c"), counting("d"), max_steps=1)
    trainer.train()
    assert calls == ["a", "b", "c", "d"]
    assert isinstance(trainer.callback_handler.callbacks[0], IST)


def test_what_is_saved_is_a_plain_adapter(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, IST(update_interval=2))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    rows = tiny_rows(4)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    loaded.eval()
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trainer.model(**batch).logits)


def test_modules_to_save_train_at_every_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_lora(modules_to_save=["lm_head"])
    callback = IST(num_active_layers=1)
    watch = Watch(callback)
    with caplog.at_level(logging.WARNING, logger="ist"):
        make_trainer(tmp_path, callback, watch, model=model, max_steps=4).train()
    assert [moved - {None} for moved in watch.moved] == watch.chosen
    assert all(None in moved for moved in watch.moved)
    said = [record.getMessage() for record in caplog.records if "train at every step" in record.getMessage()]
    assert len(said) == 1


def test_model_init_and_a_selector_by_function(tmp_path: Path) -> None:
    trainer = Trainer(
        model_init=lambda: tiny_lora(), args=arguments(tmp_path), train_dataset=tiny_rows(32),  # pyright: ignore[reportArgumentType]
        callbacks=[IST(selector=RandomSelector, num_active_layers=1)],
    )  # fmt: skip
    trainer.train()
    assert {len(event["active"]) for event in read_history(tmp_path) if event["event"] == "step"} == {1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_llama, "LlamaForCausalLM has no adapters: wrap it first"),
        (
            lambda: get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            "PROMPT_TUNING is a prompt-learning method",
        ),
        (lambda: merged(tiny_lora()), "is merged into its base weights.*unmerge_adapter"),
        (lambda: tiny_lora(1), "needs at least 2"),
    ],
    ids=["no adapters", "prompt learning", "merged", "one layer"],
)
def test_a_model_that_does_not_fit_is_one_clear_line(tmp_path: Path, make: Any, message: str) -> None:
    trainer = make_trainer(tmp_path, IST(), model=make())
    with pytest.raises(ValueError, match=message) as error:
        trainer.train()
    assert "\n" not in str(error.value)


def merged(model: Any) -> Any:
    model.merge_adapter()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and layer_of(name) is not None)
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_active": 3}, "Unknown option num_active"),
        ({"beta": 1.5}, r"beta=1.5 is not a number in \[0, 1\]"),
        ({"selector": "lora"}, "selector='lora' is unknown"),
        ({"config": ISTConfig(), "beta": 0.5}, "Both a config and the options beta"),
    ],
)
def test_bad_options_are_said_when_they_are_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IST(**options)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", IST())
    (tmp_path / "file").write_text("")
    trainer.args.output_dir = str(tmp_path / "file" / "below")
    before = traces(trainer.model)
    with pytest.raises(ValueError, match=r"Cannot write the history to .*Not a directory"):
        trainer.train()
    assert traces(trainer.model) == before


def test_versions_are_recorded(tmp_path: Path) -> None:
    make_trainer(tmp_path, IST(), max_steps=1).train()
    run = read_history(tmp_path)[0]
    assert run["versions"] == {
        "ist": ist.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    assert run["layers"] == [f"base_model.model.model.layers.{i}" for i in range(4)]
    assert peft.__version__


class MaskingCollator:
    """Draws from a generator of its own, as a collator for masked language modelling does with a seed."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(5)

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        ids = torch.stack([row["input_ids"] for row in rows])
        noise = torch.randint(64, ids.shape, generator=self._generator)
        return {"input_ids": torch.where(noise < 16, noise, ids), "labels": ids}


def test_probes_leave_a_collators_own_generator_alone(tmp_path: Path) -> None:
    runs = []
    for name, callback in (("ist", IST(mu=0, update_interval=2)), ("random", IST(selector="random"))):
        trainer = make_trainer(tmp_path / name, callback)
        trainer.data_collator = MaskingCollator()
        trainer.train()
        runs.append(snapshot(trainer.model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, IST())
    trainer.args.deepspeed = "on"
    with pytest.raises(ValueError, match=r"DeepSpeed is on, .*: train with DDP or FSDP2\."):
        IST().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
