"""LoRA as one function: PEFT's outputs and gradients, and what it keeps."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ist import SparseTuner
from ist.step.fused import FusedLora, choice, few, precision, products, reason_against
from ist.step.fused import frozen as fused_frozen
from tests.helpers.tiny import tiny_batches, tiny_lora

WIDTH, OUT = 48, 40
WAYS = pytest.mark.parametrize("most_rows", [0, 2048], ids=["one function", "that of few rows"])
"""How active modules without dropout compute."""
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "bias of B": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.3},
    "dropout and bias of B": {"lora_dropout": 0.3, "lora_bias": True},
}
BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, OUT, bias=False),
    "with a bias": lambda: nn.Linear(WIDTH, OUT),
    "Conv1D": lambda: Conv1D(OUT, WIDTH),
}


def adapt(base: nn.Module, dtype: torch.dtype, adapter_dtype: torch.dtype | None = None, **settings: Any) -> Any:
    """A LoRA module with random values, in training."""
    config = peft.LoraConfig(
        target_modules=["proj"], r=4, lora_alpha=7, fan_in_fan_out=isinstance(base, Conv1D), **settings
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on biases of B over modules without a bias
        module: Any = peft.inject_adapter_in_model(config, nn.ModuleDict({"proj": base}))["proj"]  # type: ignore
    module.to(dtype)
    for name, parameter in module.named_parameters():
        parameter.data = torch.randn_like(parameter) / 4
        if "lora_" in name and adapter_dtype:
            parameter.data = parameter.data.to(adapter_dtype)
    return module.train()


def fuse(module: nn.Module, **options: Any) -> FusedLora:
    return FusedLora(module, nullcontext(), **options)


def results(module: nn.Module, x: Tensor, dy: Tensor, seed: int = 5) -> list[Tensor]:
    """The output and the gradients of the input and of all trainable parameters."""
    x = x.clone().requires_grad_()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    torch.manual_seed(seed)
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy.to(y.dtype))]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest deviation, relative to the size of what it deviates from."""
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max())
        for a, b in zip(found, expected, strict=True)
    )


def draws(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("kind", "base"), list(itertools.product(KINDS, BASES)))
@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 1, 3)], ids=["rows", "batch", "four dimensions"])
@WAYS
def test_equals_peft_in_float64(
    kind: str, base: str, shape: tuple[int, ...], most_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few, "MOST_ROWS", most_rows)
    module = adapt(BASES[base](), torch.float64, **KINDS[kind])
    x, dy = draws(*shape, WIDTH), draws(*shape, OUT)
    expected = results(module, x, dy)
    fuse(module)
    assert difference(results(module, x, dy), expected) < 1e-12


def squared_errors(
    make: Callable[[], nn.Module], x_dtype: torch.dtype, dy_dtype: torch.dtype, autocast: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Of the output and each gradient against float64, summed over draws: of this library, and of PEFT."""
    sums = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    for draw in range(40):
        torch.manual_seed(draw)
        module = make()
        x, dy = draws(64, WIDTH).to(x_dtype), draws(64, OUT).to(dy_dtype)
        exact = results(copy.deepcopy(module).double(), x.double(), dy.double())
        found = []
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            found.append(results(module, x, dy))
            fuse(module)
            found.append(results(module, x, dy))
        pefts, ours = found
        assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in pefts]
        for side, tensors in enumerate((ours, pefts)):
            errors = [(a.double() - b).square().mean() for a, b in zip(tensors, exact, strict=True)]
            sums[side] = sums[side] + torch.stack(errors)
    return sums[0], sums[1]


def no_worse(ours: Tensor, pefts: Tensor) -> None:
    """Of errors that are float32's alone, how a processor adds up decides; those of bfloat16 are far above them."""
    assert (ours <= torch.where(pefts > 1e-8, 1.02, 1.25) * pefts + 1e-15).all(), (ours / pefts).sqrt()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32], ids=["bf16 adapter", "float32 adapter"])
@WAYS
def test_in_bf16_no_worse_than_peft(
    base: str, adapter: torch.dtype, most_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few, "MOST_ROWS", most_rows)
    no_worse(*squared_errors(lambda: adapt(BASES[base](), torch.bfloat16, adapter), torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32], ids=["bf16 adapter", "float32 adapter"])
def test_idle_in_bf16_no_worse_than_peft(base: str, adapter: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products of parts where a GPU has them, for a response that is a tenth of the output."""
    on_gpu = precision.Split() if adapter == torch.float32 else precision.Plain(None, adapter, adapter)
    monkeypatch.setattr(fused_frozen, "products", lambda *_: on_gpu)
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for draw in range(40):
        torch.manual_seed(draw)
        module = adapt(BASES[base](), torch.bfloat16, adapter)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(False)
            if "lora_B" in name:
                parameter.data /= 8
        x, dy = draws(64, WIDTH).bfloat16(), draws(64, OUT).bfloat16()
        exact = results(copy.deepcopy(module).double(), x.double(), dy.double())
        pefts = results(module, x, dy)
        fuse(module).switch.frozen = True
        for side, found in enumerate((results(module, x, dy), pefts)):
            sums[side] += torch.stack([(a.double() - b).square().mean() for a, b in zip(found, exact, strict=True)])
    no_worse(*sums)


def test_frozen_matrices_are_prepared_once_and_anew_when_written_to() -> None:
    module = adapt(nn.Linear(WIDTH, OUT), torch.float64)
    x, dy = draws(6, WIDTH), draws(6, OUT)
    prepared = 0
    fused = fuse(module)
    fused.switch.frozen = True

    prepare = fused_frozen.frozen_pair

    def count(*arguments: Any) -> Any:
        nonlocal prepared
        prepared += 1
        return prepare(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_frozen, "frozen_pair", count)
        for change, number in (
            (lambda: None, 1),
            (lambda: None, 1),
            (lambda: module.lora_A["default"].weight.mul_(2), 2),
            (lambda: module.load_state_dict(module.state_dict()), 3),
            (lambda: fused.switch.pairs.clear(), 4),
            (lambda: module.scaling.update(default=0.5), 4),  # the factor is no part of it
        ):
            with torch.no_grad():
                change()
            found = module(x)
            assert prepared == number
            fused.switch.frozen = False
            assert difference([found.detach()], results(module, x, dy)[:1]) < 1e-12
            fused.switch.frozen = True


def test_what_an_optimizer_writes_past_the_counter_is_seen_when_the_layer_goes_frozen() -> None:
    model = tiny_lora()
    batch = tiny_batches(1)[0]
    with SparseTuner(model, num_active_layers=2, probe_batches=[batch]) as tuner:
        for active in ((0, 1), (2, 3), (0, 1)):
            tuner.selector.choose = lambda _, active=active: active  # type: ignore[method-assign]
            tuner.begin_step()
            model(**batch).loss.backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.data.view(-1).numpy()[:] += 0.1  # as an optimizer with kernels of its own does
                    parameter.grad = None
            tuner.end_step()
        tuner.begin_step()
        found = model(**batch).logits
    torch.testing.assert_close(found, model(**batch).logits)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["float32 base", "bf16 base"])
def test_under_autocast_no_worse_than_peft(half: torch.dtype, weights: torch.dtype) -> None:
    ours, pefts = squared_errors(
        lambda: adapt(nn.Linear(WIDTH, OUT), weights, torch.float32), weights, half, autocast=half
    )
    no_worse(ours, pefts)


def test_products_of_bfloat16_parts_are_those_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product of `Split` against the same of `Plain` in float64; bfloat16 itself would be off by 2⁻⁹."""
    # On a CPU there is no product of bfloat16 matrices with a float32 result.
    monkeypatch.setattr(precision, "wide_product", lambda left, right: left.float() @ right.float())
    split, exact = precision.Split(), precision.Plain(None, torch.float64, torch.float64)
    x, dy = draws(30, WIDTH).bfloat16(), draws(30, OUT).bfloat16()
    a, b, h, dh = draws(4, WIDTH).float(), draws(OUT, 4).float(), draws(30, 4).float(), draws(30, 4).float()

    def doubled(*tensors: Tensor) -> list[Tensor]:
        return [tensor.double() for tensor in tensors]

    for name, arguments, factor in (
        ("product_with_a", (x, a), ()),
        ("grad_of_b", (dy, h), (0.7,)),
        ("grad_of_h", (dy, b), ()),
        ("grad_of_a", (dh, x), (None, 0.7)),
    ):
        found = getattr(split, name)(*arguments, *factor)
        expected = getattr(exact, name)(*doubled(*arguments), *factor)
        assert found.dtype == torch.float32
        assert difference([found], [expected]) < 3e-5
    for name, size, arguments in (("add_up_", OUT, (h, b)), ("add_product_with_a_", WIDTH, (dh, a))):
        expected = torch.zeros(30, size, dtype=torch.float64)
        getattr(exact, name)(expected, *doubled(*arguments), 0.7)
        found = (-expected).bfloat16()
        getattr(split, name)(found, *arguments, 0.7)
        # What is left is the rounding of where the sum began, not that of the product.
        left = expected - (expected.bfloat16()).double()
        assert difference([found], [left]) < 2e-2
    dh64, a64 = doubled(dh, a)
    assert difference([split.product_of_h(dh, a, 0.7)], [exact.product_of_h(dh64, a64, 0.7)]) < 2**-8
    dropped, mask = split.drop(x, 0.25)
    assert torch.equal(dropped, x * mask)
    assert split.rest(0.25) == 1 / 0.75
    assert torch.equal(split.mask(x, mask, 0.25), dropped)


def test_parts_are_taken_for_float32_over_bfloat16_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "working_kernels", lambda device: None)
    half, full = torch.bfloat16, torch.float32
    on_gpu: Any = SimpleNamespace(is_cuda=True, dtype=full, device=None)
    assert isinstance(choice.products(on_gpu, None, half, half), precision.Split)
    for a, autocast, activations in (
        (torch.zeros(1), None, (half, half)),
        (on_gpu, half, (half, half)),
        (on_gpu, None, (half, full)),
        (on_gpu, None, (torch.float16, torch.float16)),
        (SimpleNamespace(is_cuda=True, dtype=half, device=None), None, (half, half)),
    ):
        assert isinstance(choice.products(a, autocast, *activations), precision.Plain)  # type: ignore[arg-type]


@pytest.mark.parametrize("few_rows", [0, 2048], ids=["one function", "autograd's operations"])
def test_frozen_module_gives_the_input_its_gradient_and_keeps_nothing(
    few_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "FEW_ROWS", few_rows)
    module = adapt(nn.Linear(WIDTH, OUT), torch.float64, lora_dropout=0.3)
    x, dy = draws(6, WIDTH), draws(6, OUT)
    fused = fuse(module)
    fused.switch.frozen = True
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(given := x.clone().requires_grad_())
    weights = {parameter.data_ptr() for parameter in module.parameters()}
    assert all(t.data_ptr() in weights or t.shape[0] == 4 for t in kept)  # and the adapter's matrices as prepared
    assert all(t.shape[0] != 6 for t in kept)
    y.backward(dy)
    assert all(parameter.grad is None for parameter in module.parameters())
    module.eval()
    fused.remove()
    expected = results(module, x, dy)
    assert difference([y.detach(), given.grad], expected[:2]) < 1e-12  # type: ignore[list-item]


@pytest.mark.parametrize("few_rows", [0, 2048], ids=["one function", "autograd's operations"])
@pytest.mark.parametrize("kind", ["plain", "bias of B"])
@pytest.mark.parametrize("bias", [False, True])
def test_frozen_module_with_more_outputs_than_inputs(
    few_rows: int, kind: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its adapter's product is written first, and the module's own added."""
    monkeypatch.setattr(products, "FEW_ROWS", few_rows)
    module = adapt(nn.Linear(WIDTH, 2 * WIDTH, bias=bias), torch.float64, **KINDS[kind])
    x, dy = draws(2, 3, WIDTH), draws(2, 3, 2 * WIDTH)
    expected = results(module, x, dy)[:2]
    fuse(module).switch.frozen = True
    y = module(given := x.clone().requires_grad_())
    y.backward(dy)
    assert difference([y.detach(), given.grad], expected) < 1e-12  # type: ignore[list-item]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("few_rows", [0, 2048])
def test_outputs_may_be_changed_in_place(
    frozen: bool, bias: bool, shape: tuple[int, ...], few_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OLMo clamps its queries, keys and values; with gradients and without."""
    monkeypatch.setattr(products, "FEW_ROWS", few_rows)
    monkeypatch.setattr(few, "MOST_ROWS", few_rows)
    module = adapt(nn.Linear(WIDTH, 2 * WIDTH, bias=bias), torch.float64)
    x, dy = draws(*shape, WIDTH), draws(*shape, 2 * WIDTH)
    found = []
    for change in (lambda: None, lambda: setattr(fuse(module).switch, "frozen", frozen)):
        change()
        y = module(given := x.clone().requires_grad_()).clamp_(-2, 2)
        y.backward(dy)
        with torch.no_grad():
            found.append([y.detach(), given.grad, module(x).clamp_(-2, 2)])
    assert difference(found[1], found[0]) < 1e-12


def test_frozen_modules_keep_no_copy_of_a_weight_that_autocast_casts() -> None:
    module = adapt(nn.Linear(WIDTH, OUT), torch.float32)
    fuse(module).switch.frozen = True
    kept: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        module(torch.randn(2, 3, WIDTH, requires_grad=True))
    weights = {parameter.data_ptr() for parameter in module.parameters()}
    assert all(t.data_ptr() in weights or t.numel() < WIDTH * OUT for t in kept)


def test_a_gradient_of_another_dtype_starts_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward under autocast, of a forward without: nothing of what was in memory before gets into it."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(products, "FEW_ROWS", 0)
    y = torch.full((3, 5), float("nan"))
    products.add_product_(y, torch.ones(3, 2).bfloat16(), torch.ones(2, 5).bfloat16(), 0.5, add=False)
    assert torch.equal(y, torch.ones(3, 5))


def test_what_is_prepared_in_inference_mode_can_be_trained_past() -> None:
    module = adapt(nn.Linear(WIDTH, OUT), torch.float32)
    fuse(module).switch.frozen = True
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            module(torch.randn(2, 3, WIDTH))
        module(x := torch.randn(2, 3, WIDTH, requires_grad=True)).sum().backward()
    assert x.grad is not None


def test_the_module_of_a_later_one_is_left_alone() -> None:
    module = adapt(nn.Linear(WIDTH, OUT), torch.float32)
    first, second = fuse(module), fuse(module)
    first.remove()
    assert module.__dict__["_ist_switch"] is second.switch
    second.remove()
    assert "forward" not in module.__dict__


def test_no_kernels_on_a_cpu() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert isinstance(choice.products(torch.zeros(4, 8, dtype=dtype), None, dtype), precision.Plain)


def test_active_module_keeps_its_input_alone() -> None:
    """And the adapter's rank-wide product. q, k and v share the input: they keep the same memory."""
    modules = [adapt(nn.Linear(WIDTH, OUT), torch.float32, lora_dropout=0.1) for _ in range(3)]
    x = torch.randn(6, WIDTH, requires_grad=True)
    kept: list[Tensor] = []
    for module in modules:
        fuse(module)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sum(module(x).sum() for module in modules)
    parameters = {p.data_ptr() for module in modules for p in module.parameters()}
    activations = {t.data_ptr(): t.shape for t in kept if t.data_ptr() not in parameters}
    assert sorted(activations.values()) == sorted([(6, 4)] * 3 + [(6, WIDTH)])


def test_dropout_leaves_the_generator_where_peft_leaves_it() -> None:
    module = adapt(nn.Linear(WIDTH, OUT), torch.float32, lora_dropout=0.3)
    after = []
    for change in (lambda: None, lambda: fuse(module)):
        change()
        results(module, draws(6, WIDTH).float(), draws(6, OUT).float())
        after.append(torch.get_rng_state())
    assert torch.equal(*after)


def test_frozen_dropout_is_that_of_peft() -> None:
    module = adapt(nn.Linear(WIDTH, OUT), torch.float64, lora_dropout=0.3)
    x, dy = draws(6, WIDTH), draws(6, OUT)
    expected = results(module, x, dy)[:2]
    fuse(module, keep_dropout=True).switch.frozen = True
    x.requires_grad_()
    torch.manual_seed(5)
    y = module(x)
    y.backward(dy)
    assert difference([y.detach(), x.grad], expected) < 1e-12  # type: ignore[list-item]


STATES: dict[str, Callable[[Any], Any]] = {
    "adapters off": lambda module: module.enable_adapters(False),
    "merged": lambda module: module.merge(),
    "another adapter": lambda module: (
        module.update_layer("b", 3, 4, config=peft.LoraConfig()),
        module.set_adapter("b"),
    ),
    "two adapters": lambda module: (
        module.update_layer("b", 3, 4, config=peft.LoraConfig()),
        module.set_adapter(["default", "b"]),
    ),
    "no adapter": lambda module: module.set_adapter([]),
}


@pytest.mark.parametrize("state", STATES)
def test_states_of_a_module_are_those_of_peft(state: str) -> None:
    module = adapt(nn.Linear(WIDTH, OUT), torch.float64)
    twin = copy.deepcopy(module)
    fuse(module)
    for either in (module, twin):
        torch.manual_seed(1)
        STATES[state](either)
    x = draws(6, WIDTH)
    torch.testing.assert_close(module(x), twin(x), rtol=1e-12, atol=1e-12)
    mixed = ["default", "__base__"] * 3
    if state == "another adapter":
        torch.testing.assert_close(module(x, adapter_names=mixed), twin(x, adapter_names=mixed))


def test_copies_are_fused_on_their_own_and_pickles_are_pefts() -> None:
    module = adapt(nn.Linear(WIDTH, OUT), torch.float64)
    x = draws(6, WIDTH)
    fused = fuse(module)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.lora_B["default"].weight.zero_()
    assert not torch.equal(twin(x), module(x))
    restored = pickle.loads(pickle.dumps(module))
    torch.testing.assert_close(restored(x), module(x))
    fused.remove()
    assert "forward" not in module.__dict__
    assert "forward" in twin.__dict__


def test_other_modules_say_why_they_are_not_fused() -> None:
    def reasons(**settings: Any) -> set[str | None]:
        model = tiny_lora(**settings)
        own = {id(parameter) for parameter in model.parameters()}
        modules: list[Any] = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
        return {reason_against(module, own) for module in modules}

    assert reasons() == {None}
    assert reasons(use_dora=True) == {"a variant of LoRA (such as DoRA)"}
    assert reasons(target_modules=["embed_tokens"]) == {"lora.Embedding"}


def test_tuner_counts_and_undoes_what_it_fused() -> None:
    model = tiny_lora()
    batch = tiny_batches(1)[0]
    before = model(**batch).logits
    tuner = SparseTuner(model, probe_batches=[batch])
    number = sum(isinstance(module, peft.tuners.lora.LoraLayer) for module in model.modules())
    assert (tuner.num_fused, dict(tuner.not_fused)) == (number, {})
    tuner.close()
    assert torch.equal(model(**batch).logits, before)
    assert all("forward" not in module.__dict__ for module in model.modules())
    with SparseTuner(model, probe_batches=[batch], fused=False) as tuner:
        assert (tuner.num_fused, dict(tuner.not_fused)) == (0, {"switched off": number})


def test_a_tuner_that_took_the_place_of_another_keeps_its_modules() -> None:
    """As when a cell of a notebook is run again: the earlier tuner is collected after the later one is made."""
    model = tiny_lora()
    tuner = SparseTuner(model, probe_batches=tiny_batches(2))
    tuner = SparseTuner(model, probe_batches=tiny_batches(2))
    gc.collect()
    tuner.begin_step()
    model(**tiny_batches(1)[0]).loss.backward()
    taken = [module for module in model.modules() if "_ist_switch" in module.__dict__]
    assert len(taken) == tuner.num_fused > 0
    tuner.close()
    assert not any("_ist_switch" in module.__dict__ for module in model.modules())
