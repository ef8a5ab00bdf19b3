"""Every architecture: ten steps of IST move the active layers alone, and the adapter loads without this library."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.mamba import modeling_mamba

from ist import IST, SparseTuner, discover_layers
from ist.adapters.layers import Layer, parameters_outside
from tests.helpers.models import ALL_ARCHITECTURES, LLAMA_MLP, make_batch, make_lora, make_model
from tests.helpers.tiny import snapshot, trainable

BASE = "base_model.model"
LANGUAGE, VISION = "language_model.layers", "vision_tower.encoder.layers"
# PEFT turns the names of single experts into those of stacked parameters, and says so of each.
OLD_NAMES = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")


@dataclass(frozen=True)
class Case:
    """A model and what to train in it."""

    name: str
    layers: str | list[str] | None = None
    lora: dict[str, Any] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()
    """Layers whose output nothing reads."""

    @property
    def id(self) -> str:
        layers = self.layers if isinstance(self.layers, str) else " and ".join(self.layers or ())
        return ", ".join(filter(None, [self.name, layers, *self.lora]))


CASES = [
    *(Case(name, architecture.layers) for name, architecture in ALL_ARCHITECTURES.items()),
    Case("swin", "layers.*.blocks"),
    Case("t5", "decoder.block"),
    Case("whisper", "decoder.layers"),
    Case("llava", VISION, unreached=(f"model.{VISION}.2",)),
    Case("llava", [VISION, LANGUAGE], unreached=(f"model.{VISION}.2",)),
    Case("llava", lora={"target_modules": r".*language_model\..*\.(q_proj|v_proj)"}),
    Case("clip", "text_model.encoder.layers"),
    Case("clip", "vision_model.encoder.layers"),
    Case("flux", "single_transformer_blocks"),
    Case("mixtral", lora={"target_parameters": ["mlp.experts.gate_up_proj"]}),
    Case("qwen3-moe", lora={"target_modules": ["q_proj", *LLAMA_MLP], "target_parameters": None}),
]
PARAMETERS = [
    pytest.param(case, id=case.id, marks=OLD_NAMES if "down_proj" in case.lora.get("target_modules", ()) else ())
    for case in CASES
]


def make_tuner(model: nn.Module, case: Case, **options: Any) -> SparseTuner:
    """Half of the layers a step; importance is measured every third."""
    return SparseTuner(
        model,
        layers=case.layers,
        loss_function=ALL_ARCHITECTURES[case.name].loss,
        num_active_layers=0.5,
        update_interval=3,
        **options,
    )


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)


def check_step(
    model: nn.Module, layers: tuple[Layer, ...], active: tuple[int, ...], before: dict[str, Tensor]
) -> set[int]:
    """Assert what an optimizer step may move; which layers did move is returned.

    The base model and frozen layers stay. What an active layer owns moves where a gradient is not zero, and so
    does what trains outside of the layers, such as the adapters of a stack that was not chosen.
    """
    owners = {id(parameter): layer.index for layer in layers for parameter in layer.parameters}
    moved_layers: set[int] = set()
    for name, parameter in model.named_parameters():
        owner = owners.get(id(parameter))
        moved = not torch.equal(before[name], parameter)
        if not parameter.requires_grad or (owner is not None and owner not in active):
            assert parameter.grad is None, name
        if parameter.grad is None:
            assert not moved, name
        elif parameter.grad.any():
            assert moved, name
        if moved and owner is not None:
            moved_layers.add(owner)
    return moved_layers


def outputs_of(name: str, model: nn.Module) -> dict[str, Tensor]:
    """What the model returns for a batch in evaluation mode.

    It is frozen, as PEFT loads it: how torch multiplies a matrix by a strided batch, and so the last bit of Mamba's
    outputs, depends on `requires_grad` also where no gradient is computed.
    """
    batch = {key: value for key, value in make_batch(name).items() if key != "target"}
    model.eval().requires_grad_(False)
    with torch.no_grad():
        outputs = {key: value for key, value in model(**batch).items() if isinstance(value, Tensor)}
    assert outputs
    return outputs


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two models returned the same, to the bit."""
    return list(first) == list(second) and all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("case", PARAMETERS)
def test_ten_steps_move_the_active_layers_alone(case: Case, tmp_path: Path) -> None:
    model = make_lora(case.name, **{"init_lora_weights": True, **case.lora}).train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batch, loss_of, optimizer = make_batch(case.name), ALL_ARCHITECTURES[case.name].loss, make_optimizer(model)
    importance: list[list[float]] = []
    with make_tuner(model, case, probe_batches=[batch]) as tuner:
        unreached = {layer.index for layer in tuner.layers if layer.name.removeprefix(f"{BASE}.") in case.unreached}
        assert len(unreached) == len(case.unreached)
        ever_frozen: set[int] = set()
        for _ in range(10):
            active = tuner.begin_step()
            before = snapshot(model)
            loss_of(model, batch).backward()
            optimizer.step()
            assert check_step(model, tuner.layers, active, before) == set(active) - unreached
            ever_frozen |= set(range(len(tuner.layers))) - set(active)
            optimizer.zero_grad()
            update = tuner.end_step(optimizer)
            if update is not None:
                importance.append(list(update.importance))
    assert ever_frozen
    assert len(importance) == 3
    assert all(math.isfinite(score) for scores in importance for score in scores)
    changes = [now != then for then, now in zip([[0.0] * len(importance[0]), *importance], importance, strict=False)]
    assert changes == [True, True, True]
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())

    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(make_model(case.name), tmp_path)  # type: ignore[arg-type]
    outputs = outputs_of(case.name, model)
    assert same(outputs_of(case.name, loaded), outputs)
    assert not same(outputs_of(case.name, make_model(case.name)), outputs)


# ---- Which layers


def blocks(stack: str, count: int) -> list[str]:
    return [f"{stack}.{i}" for i in range(count)]


WHISPER = blocks("model.encoder.layers", 3) + blocks("model.decoder.layers", 2)
SWITCH = blocks("encoder.block", 3) + blocks("decoder.block", 2)
FLUX = blocks("transformer_blocks", 2) + blocks("single_transformer_blocks", 3)
CLIP = blocks("text_model.encoder.layers", 3) + blocks("vision_model.encoder.layers", 3)
LLAVA = blocks(f"model.{VISION}", 3) + blocks(f"model.{LANGUAGE}", 3)

FOUND: list[tuple[str, Any, list[str], int]] = [
    ("whisper", None, WHISPER, 4),
    ("whisper", "encoder.layers", WHISPER[:3], 4),
    ("whisper", "decoder.layers", WHISPER[3:], 6),
    ("wav2vec2", None, blocks("wav2vec2.encoder.layers", 3), 4),
    ("mamba", None, blocks("backbone.layers", 3), 2),
    ("falcon-mamba", None, blocks("backbone.layers", 3), 2),
    ("mamba2", None, blocks("backbone.layers", 3), 1),
    ("qwen2-moe", None, blocks("model.layers", 3), 4),
    ("qwen3-moe", None, blocks("model.layers", 3), 3),
    ("switch", None, SWITCH, 10),
    ("llava", LANGUAGE, LLAVA[3:], 5),
    ("llava", VISION, LLAVA[:3], 4),
    ("llava", [LANGUAGE, VISION], LLAVA, 4),
    ("clip", "text_model.encoder.layers", CLIP[:3], 4),
    ("clip", "vision_model.encoder.layers", CLIP[3:], 4),
    ("clip", "*.layers", CLIP, 4),
    ("dit", None, blocks("transformer_blocks", 3), 3),
    ("flux", f"{BASE}.transformer_blocks", FLUX[:2], 2),
    ("flux", "transformer_blocks", FLUX[:2], 2),
    ("flux", "single_transformer_blocks", FLUX[2:], 3),
    ("flux", ["transformer_blocks", "single_transformer_blocks"], FLUX, 2),
]


@pytest.mark.parametrize(("name", "layers", "expected", "num_adapters"), FOUND)
def test_the_layers_that_are_found(name: str, layers: Any, expected: list[str], num_adapters: int) -> None:
    """Names, order and the adapters in the first layer."""
    model = make_lora(name)
    found = discover_layers(model, layers)
    assert [layer.name.removeprefix(f"{BASE}.") for layer in found] == expected
    assert len(found[0].adapters) == num_adapters
    order: list[int] = []
    for layer in found:
        layer.module.register_forward_pre_hook(lambda *_, index=layer.index: order.append(index))
    ALL_ARCHITECTURES[name].loss(model, make_batch(name))
    # CLIP's towers do not depend on each other: it looks at the image first.
    assert order == (list(range(len(found))) if layers != "*.layers" else [3, 4, 5, 0, 1, 2])


TWO_STACKS = {
    "llava": (f"model.{VISION}", f"model.{LANGUAGE}"),
    "clip": ("text_model.encoder.layers", "vision_model.encoder.layers"),
    "flux": ("transformer_blocks", "single_transformer_blocks"),
}


@pytest.mark.parametrize("name", TWO_STACKS)
def test_two_stacks_without_a_choice_are_refused_in_one_line_that_names_both(name: str) -> None:
    with pytest.raises(ValueError, match="2 stacks of blocks") as caught:
        make_tuner(make_lora(name), Case(name))
    message = str(caught.value)
    assert "\n" not in message
    assert all(f"'{BASE}.{stack}' (" in message for stack in TWO_STACKS[name])
    assert f"layers='{BASE}.{TWO_STACKS[name][0]}'" in message


def test_the_stack_that_was_not_chosen_trains_at_every_step() -> None:
    model = make_lora("llava")
    outside = parameters_outside(model, discover_layers(model, LANGUAGE))
    assert outside
    assert all(f".{VISION}." in name for name in outside)


def test_the_last_vision_layer_that_llava_does_not_read_can_be_left_out() -> None:
    """`vision_feature_layer` is -2: the case above shows that the last layer never moves."""
    assert ALL_ARCHITECTURES["llava"].config.vision_feature_layer == -2
    model = make_lora("llava", target_modules=r".*vision_tower\..*layers\.[01]\..*\.(q_proj|v_proj)")
    assert [layer.name for layer in discover_layers(model)] == [f"{BASE}.{name}" for name in LLAVA[:2]]


@OLD_NAMES
@pytest.mark.parametrize(
    ("name", "lora", "layer", "expected"),
    [
        ("mixtral", {"target_parameters": ["mlp.experts.down_proj"]}, 0, ["mlp.experts"]),
        ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}, 0, ["mlp.experts"]),
        ("qwen3-moe", {}, 0, ["mlp.experts"]),
        ("qwen3-moe", {"target_modules": ["q_proj", *LLAMA_MLP], "target_parameters": None}, 0, ["mlp.experts"]),
        ("switch", {}, 4, [f"layer.2.mlp.experts.expert_{i}.{part}" for i in range(4) for part in ("wi", "wo")]),
    ],
)
def test_experts_belong_to_their_layer(name: str, lora: dict[str, Any], layer: int, expected: list[str]) -> None:
    """Whether they are modules of their own or slices of one parameter."""
    found = discover_layers(make_lora(name, **lora))[layer]
    assert [
        part for part in (a.removeprefix(f"{found.name}.") for a in found.adapters) if "experts" in part
    ] == expected


# ---- Facts about single families


def test_an_expert_that_no_token_reached_stays() -> None:
    """Where experts are modules: their gradients stay None in an active layer too."""
    model, batch = make_lora("switch").train(), make_batch("switch")
    optimizer, before = make_optimizer(model), snapshot(model)
    with SparseTuner(model, num_active_layers=1.0) as tuner:
        tuner.begin_step()
        ALL_ARCHITECTURES["switch"].loss(model, batch).backward()
        optimizer.step()
    experts = {name: parameter for name, parameter in model.named_parameters() if "expert_" in name and "lora_" in name}
    moved = {name for name, parameter in experts.items() if not torch.equal(before[name], parameter)}
    assert moved == {name for name, parameter in experts.items() if parameter.grad is not None}
    assert 0 < len(moved) < len(experts)


@pytest.mark.parametrize("name", ["mamba", "falcon-mamba", "mamba2"])
def test_peft_refuses_out_proj_of_mamba(name: str) -> None:
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba"):
        make_lora(name, target_modules=["in_proj", "out_proj"])


def test_mamba_reads_the_weight_of_dt_proj_so_an_adapter_there_never_computes() -> None:
    model = make_lora("mamba", target_modules=["in_proj", "dt_proj"]).train()
    ALL_ARCHITECTURES["mamba"].loss(model, make_batch("mamba")).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all((grad is None) == ("dt_proj" in name) for name, grad in gradients.items())


@pytest.mark.parametrize(("name", "module"), [("mamba", modeling_mamba), ("falcon-mamba", modeling_falcon_mamba)])
def test_mambas_fused_kernel_is_given_the_plain_weight_of_x_proj(
    name: str, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `mamba_ssm` is installed, an adapter on `x_proj` does not compute in training; one on `in_proj` does.

    Without that package the function returns None, and the modules are called.
    """
    fused, weights = module.mamba_inner_fn, []

    def watch(projected: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert projected.requires_grad
        weights.append(args[2])
        return fused(projected, *args, **kwargs)

    monkeypatch.setattr(module, "mamba_inner_fn", watch)
    model = make_lora(name).train()
    ALL_ARCHITECTURES[name].loss(model, make_batch(name))
    mixers = [layer.module.get_submodule("mixer") for layer in discover_layers(model)]
    assert [id(weight) for weight in weights] == [id(m.get_parameter("x_proj.base_layer.weight")) for m in mixers]


def test_a_diffusion_transformer_without_a_loss_function_is_refused_when_it_is_measured() -> None:
    model = make_lora("dit")
    batch = make_batch("dit")
    del batch["target"]
    tuner = SparseTuner(model, update_interval=1, probe_batches=[batch])
    tuner.begin_step()
    with pytest.raises(ValueError, match=r"no loss .*loss_function=lambda model, batch") as caught:
        tuner.end_step()
    assert "\n" not in str(caught.value)


def test_clip_asked_for_its_loss_in_the_batch_needs_no_loss_function() -> None:
    batch: dict[str, Any] = {**make_batch("clip"), "return_loss": True}
    tuner = SparseTuner(make_lora("clip"), layers="*.layers", update_interval=1, probe_batches=[batch])
    tuner.begin_step()
    update = tuner.end_step()
    assert update is not None
    assert any(update.importance)


def test_adapters_that_diffusers_added_and_saves_itself(tmp_path: Path) -> None:
    """Its training scripts call `add_adapter`, with no PEFT model around."""
    case = Case("flux", ["transformer_blocks", "single_transformer_blocks"])
    model: Any = make_model("flux").requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    batch, optimizer = make_batch("flux"), make_optimizer(model)
    with make_tuner(model, case, probe_batches=[batch]) as tuner:
        assert [layer.name for layer in tuner.layers] == FLUX
        for _ in range(3):
            active, before = tuner.begin_step(), snapshot(model)
            ALL_ARCHITECTURES["flux"].loss(model, batch).backward()
            optimizer.step()
            assert check_step(model, tuner.layers, active, before) == set(active)
            optimizer.zero_grad()
            tuner.end_step(optimizer)
    model.save_lora_adapter(tmp_path)
    loaded: Any = make_model("flux")
    loaded.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert same(outputs_of("flux", loaded), outputs_of("flux", model))
    assert not same(outputs_of("flux", make_model("flux")), outputs_of("flux", model))


# ---- In the Trainer


class Watch(TrainerCallback):
    """Checks every optimizer step."""

    def __init__(self, ist: IST) -> None:
        self._ist = ist
        self.num_steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._before = snapshot(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert self._ist.tuner is not None
        active = self._ist.tuner.active_layers
        assert active is not None
        assert check_step(model, self._ist.tuner.layers, active, self._before) == set(active)
        self.num_steps += 1


@pytest.mark.parametrize(
    ("name", "layers"),
    [("whisper", None), ("wav2vec2", None), ("mamba", None), ("qwen3-moe", None), ("llava", LANGUAGE)],
)
def test_in_the_trainer(name: str, layers: Any, tmp_path: Path) -> None:
    model = make_lora(name, init_lora_weights=True)
    batch = make_batch(name)
    rows = [{key: value[row] for key, value in batch.items()} for row in (0, 1)] * 6
    ist = IST(num_active_layers=0.5, update_interval=2, layers=layers)
    watch = Watch(ist)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[ist, watch])  # type: ignore[arg-type]
    trainer.train()
    assert watch.num_steps == 6
    assert ist.tuner is not None
    assert ist.tuner.last_update is not None
    assert any(ist.tuner.last_update.importance)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(make_model(name), tmp_path / "adapter")  # type: ignore[arg-type]
    assert same(outputs_of(name, loaded), outputs_of(name, model))
