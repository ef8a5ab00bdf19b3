"""LoRA's start from the gradient: against the exact singular vectors, and a model whose function stays."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from ist import BottleneckConfig
from ist.focusing import find_focus, gradient_init
from ist.probing.initialisation import OVERSAMPLING, right_singular_vectors
from tests.helpers.models import make_batch, make_model
from tests.helpers.tiny import tiny_batches, tiny_llama, tiny_lora

RANK = 4
ENDS = ("q_proj", "v_proj", "up_proj", "down_proj")


def weight_gradients(model: Any, ends: tuple[str, ...], batches: list[Any]) -> dict[str, Tensor]:
    """`∂L/∂W`, `[out, in]`, by autograd; `L` is the mean over the batches."""
    model.eval().zero_grad()
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    found = {}
    for name, module in model.named_modules():
        if name.endswith(ends):
            gradient = module.weight.grad
            found[name] = gradient if isinstance(module, nn.Linear) else gradient.T  # GPT-2's Conv1D
    return found


@pytest.mark.parametrize(
    ("architecture", "ends"),
    [("llama", ("q_proj", "down_proj")), ("gpt2", ("c_attn", "mlp.c_fc")), ("bert", ("query",))],
)
def test_the_span_is_that_of_the_exact_vectors(architecture: str, ends: tuple[str, ...]) -> None:
    """With a sketch as wide as the weight nothing is approximate but the arithmetic."""
    model, batch = make_model(architecture), make_batch(architecture)
    gradients = weight_gradients(model, ends, [batch, batch])
    sides = {name: min(gradient.shape) for name, gradient in gradients.items()}
    found = right_singular_vectors(model, sides, [batch, batch])
    assert set(found) == set(gradients)
    for name, gradient in gradients.items():
        exact = torch.linalg.svd(gradient, full_matrices=False)
        for rank in range(1, sides[name]):
            strong = exact.S[rank - 1] > 1e-3 * exact.S[0] and exact.S[rank] < 0.9 * exact.S[rank - 1]
            if strong:
                own, best = found[name][:rank], exact.Vh[:rank]
                torch.testing.assert_close(own.T @ own, best.T @ best, atol=1e-3, rtol=0)


def test_a_narrow_sketch_holds_nearly_all_that_a_rank_can() -> None:
    model, batches = tiny_llama(), tiny_batches(2)
    gradients = weight_gradients(model, ENDS, batches)
    found = right_singular_vectors(model, dict.fromkeys(gradients, RANK), batches)
    for name, gradient in gradients.items():
        assert found[name].shape == (RANK, gradient.shape[1])
        torch.testing.assert_close(found[name] @ found[name].T, torch.eye(RANK), atol=1e-5, rtol=0)
        held = (gradient @ found[name].T).square().sum()
        best = torch.linalg.svdvals(gradient)[:RANK].square().sum()
        assert 0.97 * best < held < 1.0001 * best
    assert min(gradients["model.layers.0.self_attn.q_proj"].shape) > RANK + OVERSAMPLING


KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "Gaussian start": {"init_lora_weights": "gaussian"},
    "dropout": {"lora_dropout": 0.5},
    "a rank above a side": {"r": 20, "target_modules": ["q_proj", "k_proj"]},  # k_proj has 16 outputs
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_starts_as_it_was_and_is_plain_peft(kind: str, tmp_path: Path) -> None:
    (batch,) = tiny_batches(1)
    expected = tiny_llama().eval()(**batch).logits
    model = tiny_lora(**{"init_lora_weights": True, **KINDS[kind]})
    weights = dict(model.named_parameters())
    drawn = {name: weight.detach().clone() for name, weight in weights.items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    num = gradient_init(model, tiny_batches(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert num == sum("lora_A" in name for name in weights)
    for name, weight in weights.items():
        assert weight.requires_grad == ("lora_" in name)
        if "lora_A" in name:
            assert not torch.equal(weight, drawn[name])
            assert weight.norm().item() == pytest.approx(drawn[name].norm().item(), rel=1e-4)
        else:
            assert torch.equal(weight, drawn[name])
    torch.testing.assert_close(model.eval()(**batch).logits, expected, rtol=0, atol=1e-6 if kind == "DoRA" else 0)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, weights[name])


def test_the_first_step_on_b_is_nearest_to_that_of_full_fine_tuning() -> None:
    """`G AᵀA` against `G`, with `A` from the gradient and as PEFT draws it, for rows of one norm."""
    batches = tiny_batches(2)
    gradients = weight_gradients(tiny_llama(), ENDS, batches)
    model = tiny_lora(init_lora_weights=True)
    firsts = {name: module.weight for name, module in model.named_modules() if name.endswith("lora_A.default")}

    def cosines() -> list[float]:
        found = []
        for name, first in firsts.items():
            gradient = gradients[name.removeprefix("base_model.model.").removesuffix(".lora_A.default")]
            step = gradient @ first.T @ first
            found.append(nn.functional.cosine_similarity(step.flatten(), gradient.flatten(), dim=0).item())
        return found

    before = cosines()
    gradient_init(model, batches)
    after = cosines()
    assert min(after) > max(before)
    assert min(after) > 0.7


def test_the_same_seed_gives_the_same_start_and_batches_are_read_once_only() -> None:
    models = [tiny_lora(init_lora_weights=True) for _ in range(2)]
    for model in models:
        gradient_init(model, iter(tiny_batches(3)), num_batches=2, seed=5)
    first, second = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = tiny_lora(init_lora_weights=True)
    gradient_init(other, tiny_batches(2), seed=5)
    assert all(torch.equal(weight, first[name]) for name, weight in other.named_parameters())


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("num_batches", number) for number in (0, -1, 1.5, True)), ("seed", "x"), ("seed", -1), ("loss_function", 3)],
)
def test_options_that_cannot_be(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r} is n"):
        gradient_init(tiny_lora(init_lora_weights=True), tiny_batches(1), **{name: value})


def test_products_are_summed_in_float32_whatever_the_precision() -> None:
    """As in mixed-precision training, where matrix products are rounded to bfloat16."""
    batches = tiny_batches(2)
    gradients = weight_gradients(tiny_llama(), ENDS, batches)
    model = tiny_lora(init_lora_weights=True)
    with torch.autocast("cpu", torch.bfloat16):
        gradient_init(model, batches)
    for name, gradient in gradients.items():
        first = model.get_submodule(f"base_model.model.{name}.lora_A.default").weight.detach()
        held = (gradient @ (first / first.norm(dim=1, keepdim=True)).T).square().sum()
        best = torch.linalg.svdvals(gradient)[:RANK].square().sum()
        assert held > 0.9 * best


def test_what_no_gradient_reaches_keeps_its_start(caplog: pytest.LogCaptureFixture) -> None:
    """The last layer but two, whose output a loss on an earlier layer does not see, and the embedding."""
    model = tiny_lora(init_lora_weights=True, target_modules=["q_proj", "embed_tokens"])
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_" in name}

    def early(model: Any, batch: Any) -> Tensor:
        return model(**batch, output_hidden_states=True).hidden_states[2].square().mean()

    with caplog.at_level(logging.INFO, logger="ist.probing.initialisation"):
        assert gradient_init(model, tiny_batches(1), loss_function=early) == 2
    assert "A of 2 of 4 LoRA modules starts from the gradient." in caplog.text
    changed = {name for name, weight in model.named_parameters() if "lora_" in name and not weight.equal(before[name])}
    assert {name.split(".layers.")[1][0] for name in changed} == {"0", "1"}
    assert len(changed) == 2


def test_a_focused_model_starts_from_the_gradient_and_learns() -> None:
    batches = tiny_batches(4)
    base = tiny_llama()
    config = find_focus(base, LoraConfig(r=RANK, target_modules=list(ENDS)), batches).config
    torch.manual_seed(0)
    model: Any = get_peft_model(base, config)
    assert gradient_init(model, batches) == 2 * len(ENDS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


OTHERS: dict[str, tuple[Any, str]] = {
    "LoHa": (LoHaConfig(r=2, target_modules=["q_proj"]), "the model has LOHA"),
    "IA3": (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "the model has IA3"),
    "bottlenecks": (BottleneckConfig(bottleneck_size=4), "the model has BOTTLENECK"),
    "PiSSA": (LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"]), r"B of .*layers\.0.* is not zero"),
    "trained": (LoraConfig(init_lora_weights=False, target_modules=["q_proj"]), "B of .* is not zero"),
    "embeddings": (LoraConfig(target_modules=["embed_tokens"]), "LoRA is on none: give target_modules some"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_are_refused_in_one_line(kind: str) -> None:
    config, message = OTHERS[kind]
    model = get_peft_model(tiny_llama(), config)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match=message) as error:
        gradient_init(model, tiny_batches(1))
    assert "\n" not in str(error.value)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_one_of_two_active_adapters_is_not_set_alone() -> None:
    model = tiny_lora(init_lora_weights=True)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match=r"default and other are active: call model.set_adapter\('default'\)\.$"):
        gradient_init(model, tiny_batches(1))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_no_adapter_and_no_gradient_are_refused() -> None:
    with pytest.raises(ValueError, match="the model has no adapter"):
        gradient_init(tiny_llama(), tiny_batches(1))
    (batch,) = tiny_batches(1)
    ignored = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(ValueError, match=r"no gradient by any of the 16 modules"):
        gradient_init(
            tiny_lora(init_lora_weights=True), [ignored], loss_function=lambda m, b: m(**b).logits.detach().mean()
        )


def test_a_model_focused_on_one_layer_can_start_from_the_gradient() -> None:
    base, batches = tiny_llama(4), tiny_batches(2)
    config = find_focus(base, LoraConfig(r=RANK, target_modules=["q_proj"]), num_layers=1, scores=[1, 3, 2, 0]).config
    model = get_peft_model(base, config)
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora_A" in name}
    gradient_init(model, batches)
    assert len(before) == 1
    assert all(not torch.equal(model.state_dict()[name], value) for name, value in before.items())
