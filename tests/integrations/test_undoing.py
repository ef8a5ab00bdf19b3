"""What undoes freezing elsewhere does not undo it here: PEFT's contexts, other callbacks, TRL's reference passes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ist import IST
from tests.helpers.moves import EARLY, Moves, Step, in_blocks, train_sparsely
from tests.helpers.preferences import LORA, arguments, make_trl_trainer, prompt_row
from tests.helpers.tiny import checkpoint_activations, tiny_batches, tiny_llama, tiny_lora, tiny_rows, traces

ALL_BLOCKS = {0, 1, 2, 3}

# ---- A loop by hand, and a Trainer with another callback


def reference_pass(model: Any) -> None:
    with model.disable_adapter(), torch.no_grad():
        model(**tiny_batches(1)[0])


def reference_pass_with_a_graph(model: Any) -> None:
    with model.disable_adapter():
        model(**tiny_batches(1)[0])


def reference_adapter(model: Any) -> None:
    model.set_adapter("second")
    with torch.no_grad():
        model(**tiny_batches(1)[0])
    model.set_adapter("default")


def evaluate(model: Any) -> None:
    model.eval()
    with torch.no_grad():
        model(**tiny_batches(1)[0])
    model.train()


def unfreeze_everything(model: Any) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def unfreeze_adapters(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.requires_grad_(True)


def merge_and_unmerge(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def add_once(model: Any) -> None:
    if "late" not in model.peft_config:
        model.add_adapter("late", LoraConfig(**LORA))


def delete_once(model: Any) -> None:
    if "second" in model.peft_config:
        model.delete_adapter("second")


INTERVENTIONS: dict[str, Callable[[Any], object]] = {
    "disable_adapter()": reference_pass,
    "disable_adapter() with a graph": reference_pass_with_a_graph,
    "set_adapter": lambda model: model.set_adapter("default"),
    "set_adapter, there and back": reference_adapter,
    "base_model.set_adapter": lambda model: model.base_model.set_adapter("default"),
    "set_requires_grad": lambda model: model.set_requires_grad("default", True),
    "enable_adapter_layers": lambda model: model.base_model.enable_adapter_layers(),
    "eval() and train()": evaluate,
    "enable_input_require_grads": lambda model: model.enable_input_require_grads(),
    "requires_grad_ on adapters": unfreeze_adapters,
    "requires_grad_ on everything": unfreeze_everything,
    "merge and unmerge": merge_and_unmerge,
    "add_adapter": add_once,
    "delete_adapter": delete_once,
}
# These two move other weights than the adapter's themselves: the check is then of the adapter's alone.
MOVE_OTHERS = {"merge and unmerge", "requires_grad_ on everything"}
MOMENTS = ("before the forward", "before the backward", "between micro-batches", "before the optimizer")
CHECKPOINTING: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "checkpointing": {"use_reentrant": False},
    "reentrant checkpointing": {"use_reentrant": True},
}
FOREIGN_WARNINGS = pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad:UserWarning",  # torch's checkpoint, of a pass without gradients
    "ignore:Already found a `peft_config`:UserWarning",  # PEFT, of a second adapter
    "ignore:Adapter .* was active which is now deleted:UserWarning",
)


def two_adapters() -> Any:
    """The adapter `default`, which trains, and another one that does not."""
    model = tiny_lora()
    model.add_adapter("second", LoraConfig(**LORA))
    return model


def check_steps(steps: list[Step], names: set[str], outside: set[str] | frozenset[str] = frozenset()) -> None:
    """Each step moved the active layers' parameters among `names` and those `outside`, to the last one; in the end
    every layer had its turn."""
    for step in steps:
        assert step.moved == in_blocks(names, step.blocks) | outside
    assert set().union(*(step.blocks for step in steps)) == ALL_BLOCKS


def default_names(model: Any) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".default." in name}


def only_default(steps: list[Step]) -> list[Step]:
    return [Step(step.blocks, {name for name in step.moved if ".default." in name}) for step in steps]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", INTERVENTIONS)
@FOREIGN_WARNINGS
def test_nothing_thaws_a_frozen_layer_in_a_loop_by_hand(name: str, checkpointing: str) -> None:
    """At every moment of a step."""
    for moment in MOMENTS:
        if (name, checkpointing, moment) == ("requires_grad_ on everything", "checkpointing", "before the backward"):
            continue  # torch refuses this itself, also without IST: the recomputation saves other tensors
        model = two_adapters()
        if (kind := CHECKPOINTING[checkpointing]) is not None:
            checkpoint_activations(model.get_base_model(), **kind)
            model.get_base_model().enable_input_require_grads()
        steps = train_sparsely(model, tiny_batches(2), 4, {moment: INTERVENTIONS[name]}, num_active_layers=2)
        check_steps(only_default(steps) if name in MOVE_OTHERS else steps, default_names(model))


class Intervene(TrainerCallback):
    """Does the same thing to the model in every hook within a step."""

    def __init__(self, act: Callable[[Any], object]) -> None:
        self._act = act

    def _do(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._act(model)

    on_step_begin = on_substep_end = on_pre_optimizer_step = _do


@pytest.mark.parametrize("name", INTERVENTIONS)
@pytest.mark.parametrize("ist_first", [True, False], ids=["IST first", "IST last"])
@FOREIGN_WARNINGS
def test_nothing_thaws_a_frozen_layer_in_the_trainer(tmp_path: Path, name: str, ist_first: bool) -> None:
    model = two_adapters()
    ist = IST(num_active_layers=2, update_interval=2, seed=EARLY)
    moves, other = Moves(ist), Intervene(INTERVENTIONS[name])
    args = TrainingArguments(**arguments(tmp_path, max_steps=6, gradient_accumulation_steps=2))
    callbacks = [ist, moves, other] if ist_first else [other, ist, moves]
    Trainer(model=model, args=args, train_dataset=tiny_rows(48), callbacks=callbacks).train()  # pyright: ignore[reportArgumentType]
    assert len(moves.steps) == 6
    check_steps(only_default(moves.steps) if name in MOVE_OTHERS else moves.steps, default_names(model))


@pytest.mark.parametrize("reentrant", [False, True])
@FOREIGN_WARNINGS
def test_a_model_prepared_for_few_bits(reentrant: bool) -> None:
    """PEFT's preparation switches checkpointing and the inputs' gradients on."""
    prepared = prepare_model_for_kbit_training(tiny_llama(), gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model = get_peft_model(prepared, LoraConfig(**LORA))
    check_steps(train_sparsely(model, tiny_batches(2), 8), default_names(model))


def test_the_model_is_as_peft_left_it_afterwards() -> None:
    model = two_adapters()
    before = traces(model)
    train_sparsely(model, tiny_batches(2), 2, dict.fromkeys(MOMENTS, reference_adapter))
    assert traces(model) == before


# ---- TRL's trainers


def text_loss(model: Any, batch: Any) -> Tensor:
    """The loss of one fixed text, whatever the batch."""
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    return model(input_ids=ids, labels=ids).loss


def score_loss(model: Any, batch: Any) -> Tensor:
    """For a model with one score a text."""
    return -model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits.mean()


# A reference pass with the adapter disabled (TRL wraps the model), and one with the adapter "ref" (it is wrapped).
TRAINERS: list[tuple[str, bool, dict[str, Any]]] = [
    ("SFT", False, {}),
    ("DPO", False, {}),
    ("DPO", True, {}),
    ("DPO", False, {"gradient_checkpointing": True}),
    ("DPO", True, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ("DPO", False, {"gradient_accumulation_steps": 2}),
    ("DPO", False, {"precompute_ref_log_probs": True}),
    ("KTO", False, {}),
    ("KTO", True, {}),
    ("GRPO", False, {}),
    ("GRPO", True, {}),
    ("GRPO", False, {"gradient_accumulation_steps": 2, "num_iterations": 2}),
    ("RLOO", False, {}),
    ("RLOO", True, {}),
    ("Reward", False, {}),
]


def trainer_id(row: Any) -> str | None:
    return ("wrapped" if row else "plain") if isinstance(row, bool) else None


@pytest.mark.parametrize(("kind", "wrapped", "options"), TRAINERS, ids=trainer_id)
@FOREIGN_WARNINGS
def test_trl_trains_the_active_layers_alone(
    tmp_path: Path, tiny_model_folder: Path, kind: str, wrapped: bool, options: dict[str, Any]
) -> None:
    ist = IST(
        num_active_layers=2, update_interval=2, seed=EARLY, loss_function=score_loss if kind == "Reward" else text_loss
    )
    moves = Moves(ist)
    trainer = make_trl_trainer(kind, tiny_model_folder, tmp_path, ist, moves, wrapped=wrapped, **options)
    assert ("ref" in trainer.model.peft_config) == (wrapped and kind in ("DPO", "KTO", "GRPO", "RLOO"))
    trainer.train()
    assert len(moves.steps) == 5
    names = {name for name, _ in trainer.model.named_parameters() if "lora_" in name and ".default." in name}
    head = {name for name, _ in trainer.model.named_parameters() if "modules_to_save" in name}
    assert bool(head) == (kind == "Reward")
    check_steps(moves.steps, names, head)
    assert ist.tuner is not None
    assert ist.tuner.last_update is not None


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GRPO", "A probe batch is a list, not a mapping"),
        ("RLOO", "A probe batch is a list, not a mapping"),
    ],
)
def test_a_batch_without_a_loss_is_one_clear_line(
    tmp_path: Path, tiny_model_folder: Path, kind: str, message: str
) -> None:
    trainer = make_trl_trainer(
        kind, tiny_model_folder, tmp_path, IST(num_active_layers=2, update_interval=2, seed=EARLY)
    )
    with pytest.raises(ValueError, match=f"{message}.*pass loss_function=") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)


class Forwards(TrainerCallback):
    """How often each block computed in a step: reference passes, generation and recomputation too."""

    def __init__(self, ist: IST) -> None:
        self._ist = ist
        self._counts: list[int] = []
        self.steps: list[tuple[tuple[int, ...], list[int]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._blocks = list(model.get_base_model().model.layers)
        for index, block in enumerate(self._blocks):
            block.input_layernorm.register_forward_hook(lambda *_, index=index: self._count(index))

    def _count(self, index: int) -> None:
        self._counts[index] += 1

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._counts = [0] * len(self._blocks)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        assert self._ist.tuner is not None
        assert not any(block.gradient_checkpointing for block in self._blocks)
        self.steps.append((self._ist.tuner.active_layers or (), self._counts))


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO"])
def test_frozen_layers_alone_compute_twice_around_reference_passes(
    tmp_path: Path, tiny_model_folder: Path, kind: str
) -> None:
    ist = IST(selector="random", num_active_layers=2, seed=EARLY, recompute="frozen")
    forwards = Forwards(ist)
    trainer = make_trl_trainer(kind, tiny_model_folder, tmp_path, ist, forwards, max_steps=3)
    trainer.train()
    assert len(forwards.steps) == 3
    for active, counts in forwards.steps:
        again = [index for index in range(min(active), 4) if index not in active]
        assert [index for index in range(4) if counts[index] > counts[0]] == again  # the first never computes twice
        assert max(counts) <= counts[0] + 1
    assert any(max(counts) > counts[0] for _, counts in forwards.steps)
    assert not trainer.model.is_gradient_checkpointing
    forwards.steps.clear()
    trainer.train()
    assert len(forwards.steps) == 3


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_random_choice_needs_no_loss_function(tmp_path: Path, tiny_model_folder: Path, kind: str) -> None:
    make_trl_trainer(kind, tiny_model_folder, tmp_path, IST(selector="random", update_interval=2)).train()


# ---- The recipes of docs/preference-tuning.md


def recipe(title: str, **names: Any) -> dict[str, Any]:
    """What the first code block below a heading of the page defines, given `names`."""
    page = (Path(__file__).parents[2] / "docs" / "preference-tuning.md").read_text()
    block = re.search(rf"^## {title}$.*?```python\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    assert block, title
    exec(block[1], names)  # noqa: S102
    return names


def test_the_recipe_for_grpo_is_the_loss_of_good_answers(tmp_path: Path, tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    answer_loss = recipe("GRPO", tokenizer=tokenizer)["answer_loss"]
    ist = IST(num_active_layers=2, update_interval=2, seed=EARLY, loss_function=answer_loss)
    moves = Moves(ist)
    trainer = make_trl_trainer("GRPO", tiny_model_folder, tmp_path, ist, moves)
    trainer.train()
    check_steps(moves.steps, {name for name in default_names(trainer.model) if "lora_" in name})
    assert ist.tuner is not None
    assert ist.tuner.last_update is not None
    assert len(set(ist.tuner.last_update.losses)) == 3

    rows = [prompt_row("one", 0), prompt_row("three", 1)]
    with torch.no_grad():
        losses = [answer_tokens_loss(trainer.model, tokenizer, row) for row in rows]
        total = torch.cat(losses).mean()
        torch.testing.assert_close(answer_loss(trainer.model, rows), total)


def answer_tokens_loss(model: Any, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> Tensor:
    """The loss of each token of one answer, without padding."""
    prompt, text = (
        tokenizer(part, return_tensors="pt").input_ids for part in (row["prompt"], row["prompt"] + row["answer"])
    )
    logits = model(input_ids=text).logits[0, prompt.shape[1] - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, text[0, prompt.shape[1] :], reduction="none")


class Switches(TrainerCallback):
    """Sets another adapter active after the first micro-batch of the second step, or its forward does."""

    def __init__(self, when: str) -> None:
        self.when, self.num = when, 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.num += 1
        if self.when == "between" and self.num == 3:
            kwargs["model"].set_adapter("second")


@pytest.mark.parametrize("when", ["between", "in the last", "there and back"])
def test_an_adapter_that_is_switched_between_two_micro_batches(when: str, tmp_path: Path) -> None:
    """It is refused before the optimizer has moved anything by it; within a micro-batch any other may be active."""
    model: Any = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    model.add_adapter("second", LoraConfig(**LORA))
    switches = Switches(when)

    class Own(Trainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, *args, **kwargs)
            if when == "there and back":
                reference_adapter(model)
            if when == "in the last" and switches.num == 4:
                model.set_adapter("second")
            return loss

    args = TrainingArguments(
        str(tmp_path), max_steps=3, gradient_accumulation_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = Own(model=model, args=args, train_dataset=tiny_rows(96), callbacks=[IST(selector="all"), switches])  # type: ignore[arg-type]
    if when == "there and back":
        trainer.train()
        assert trainer.state.global_step == 3
        return
    with pytest.raises(ValueError, match=r"^The active adapter is 'second' and was 'default' when this tuner was made"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert switches.num == 4 if when == "in the last" else 3
