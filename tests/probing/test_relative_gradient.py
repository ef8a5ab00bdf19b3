"""The criterion `relative_gradient`: by hand, beside the two that it is made of, and with all the gradient promises."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from ist import layer_scores
from ist.probing.criteria import relative
from ist.probing.gradients import FirstMatrices
from ist.probing.suppression import model_loss
from tests.helpers.models import make_batch, make_model
from tests.helpers.tiny import VOCABULARY, tiny_batches, tiny_llama

LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]
SHAPES = ((4, 12), (1, 5), (3, 9))
"""Rows and tokens of three batches."""


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **options})


def scores(model: nn.Module, batches: Any, criterion: str = "relative_gradient", **options: Any) -> tuple[float, ...]:
    return layer_scores(model, options.pop("config", lora()), batches, criterion=criterion, **options)  # type: ignore[arg-type]


def test_it_is_pefts_squared_gradient_by_the_square_of_the_mean_norm() -> None:
    """Of batches of different sizes: each counts the same in the gradient, and each token in the norm."""
    batches = [{name: value[:rows, :length] for name, value in tiny_batches(1)[0].items()} for rows, length in SHAPES]
    found = scores(tiny_llama(4), iter(batches))
    model: Any = get_peft_model(tiny_llama(4), copy.deepcopy(lora())).eval()
    matrices = FirstMatrices(0)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            weight = module.lora_A["default"].weight
            weight.data.copy_(matrices.like(torch.empty(1, weight.shape[1]), len(weight)))
    outputs: list[list[Tensor]] = [[] for _ in range(4)]
    for layer, block in enumerate(model.base_model.model.model.layers):
        block.register_forward_hook(lambda block, args, output, layer=layer: outputs[layer].append(output.detach()))
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    squares = [0.0] * 4
    for layer, block in enumerate(model.base_model.model.model.layers):
        gradients = [weight.grad for name, weight in block.named_parameters() if "lora_B" in name]
        squares[layer] = sum(gradient.double().square().sum().item() for gradient in gradients)
    tokens = [torch.cat([each.flatten(0, 1) for each in own]) for own in outputs]
    assert all(len(each) == sum(rows * length for rows, length in SHAPES) for each in tokens)
    sizes = [each.double().square().sum(dim=1).sqrt().mean().item() for each in tokens]
    assert found == pytest.approx([square / size**2 for square, size in zip(squares, sizes, strict=True)], rel=1e-4)


ARCHITECTURES = {
    "llama": (["q_proj", "down_proj"], None),
    "gpt2": (["c_attn"], None),
    "t5": (["q", "v"], None),
    "vit": (["q_proj", "v_proj"], None),
    "mixtral": (["q_proj", "v_proj"], None),
    "whisper": (["q_proj", "v_proj"], None),
    "llava": ("all-linear", "language_model.layers"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_the_gradient_divided_by_the_square_of_the_activation(name: str) -> None:
    """Two stacks and two towers included."""
    targets, layers = ARCHITECTURES[name]
    model, batches = make_model(name), [make_batch(name)]
    options = {"config": LoraConfig(r=2, target_modules=targets), "layers": layers, "seed": 3}
    found, squares, norms = (
        scores(model, batches, criterion, **options) for criterion in ("relative_gradient", "gradient", "activation")
    )
    assert found == pytest.approx([square / norm**2 for square, norm in zip(squares, norms, strict=True)], rel=1e-5)
    assert len(set(found)) == len(found)


def test_one_forward_a_batch_with_the_data_read_once() -> None:
    model, batches = tiny_llama(4), tiny_batches(3)
    forwards: list[int] = []
    model.register_forward_hook(lambda *args: forwards.append(1))

    def endless() -> Iterator[Any]:
        yield from batches[:2]
        raise AssertionError("a third batch was read")

    found = scores(model, endless(), num_batches=2)
    assert len(forwards) == 2
    assert found == scores(model, batches[:2])


def test_no_more_is_kept_for_the_backward_than_by_the_gradient() -> None:
    kept: dict[str, int] = {}
    for criterion in ("gradient", "relative_gradient"):
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        def loss(model: nn.Module, batch: Mapping[str, Any], pack: Any = pack) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return model_loss(model, batch)

        scores(tiny_llama(4), tiny_batches(2), criterion, loss_function=loss)
        kept[criterion] = sum(sizes)
    assert kept["relative_gradient"] == kept["gradient"] > 0


def test_a_loss_of_ones_own_scales_the_gradient_alone() -> None:
    model, batches = tiny_llama(4), tiny_batches(2)
    twice = scores(model, batches, loss_function=lambda model, batch: 2 * model(**batch).loss)
    assert twice == pytest.approx([4 * score for score in scores(model, batches)], rel=1e-5)


def test_same_seed_same_scores_and_no_global_randomness() -> None:
    model = tiny_llama(4)
    model.config.attention_dropout = 0.5
    before = torch.random.get_rng_state()
    first, again, other = (scores(model, tiny_batches(2), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == again
    assert first != other


def everything(model: Any) -> dict[str, Any]:
    state: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    state["flags"] = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    state["modes"] = [module.training for module in model.modules()]
    state["hooks"] = [list(module._forward_hooks) for module in model.modules()]
    state["forwards"] = ["forward" in module.__dict__ for module in model.modules()]
    state["cache"] = model.config.use_cache
    return state


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        for key, value in one.items()
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = tiny_llama(4).train()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].register_forward_hook(lambda *args: None)
    before = everything(model)

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        value = model_loss(model, batch)
        if fails:
            raise RuntimeError("as a user's loss may")
        return value

    if fails:
        with pytest.raises(RuntimeError, match="as a user's"):
            scores(model, tiny_batches(1), loss_function=loss)
    else:
        scores(model, tiny_batches(1), loss_function=loss)
    assert same(before, everything(model))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_base_in_4_bits_is_measured_and_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, which quantises bases, is not installed")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
    )
    base, quantised = LlamaForCausalLM(config), BitsAndBytesConfig(load_in_4bit=True)
    base.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised)
    before = everything(model)
    found = scores(model, tiny_batches(2))
    assert same(before, everything(model))
    squares, norms = (scores(model, tiny_batches(2), criterion) for criterion in ("gradient", "activation"))
    assert found == pytest.approx([square / norm**2 for square, norm in zip(squares, norms, strict=True)], rel=1e-4)
    assert found == pytest.approx(scores(base, tiny_batches(2)), rel=0.5)


@pytest.mark.parametrize("size", [0.0, float("inf"), float("nan")])
def test_a_size_that_nothing_can_be_divided_by_is_one_line(size: float) -> None:
    model = tiny_llama(4)
    before = everything(model)

    _, _, layer, above = model.model.layers
    handles = [
        layer.register_forward_hook(lambda block, args, output: Filled.apply(output, size)),
        above.register_forward_pre_hook(lambda block, args: (Filled.apply(args[0], 1.0), *args[1:])),
    ]
    message = rf"output of model\.layers\.2 is {size:g}, and criterion='relative_gradient' divides"
    with pytest.raises(ValueError, match=message) as error:
        scores(model, tiny_batches(1))
    for handle in handles:
        handle.remove()
    assert "\n" not in str(error.value)
    assert same(before, everything(model))


class Filled(torch.autograd.Function):
    """Fill a tensor with one value, and hand on its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, value: float) -> Tensor:  # type: ignore[override]
        return torch.full_like(hidden, value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def test_a_layer_that_did_not_run_has_no_importance() -> None:
    assert relative(["one", "other"], [0.0, 8.0], [0.0, 2.0]) == [0.0, 2.0]
