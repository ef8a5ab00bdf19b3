"""Sparse adapters: what is pruned, that it stays so, and SNIP against a formula of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ist import SparseTuner
from ist.bottleneck import BottleneckConfig, BottleneckLayer, prune_adapter
from ist.bottleneck.sparse import SparseLinear, kept
from tests.helpers.models import ToyModel, toy_batch
from tests.helpers.tiny import snapshot, tiny_batches, tiny_llama, tiny_rows, trainable

SIZE = 8


def make_model(**options: Any) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(2), BottleneckConfig(**{"bottleneck_size": SIZE, **options}))
    assert isinstance(model, PeftModel)
    return model


def projections(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """Every projection of the adapter, by the name of its module."""
    found = {}
    for key, layer in model.named_modules():
        if isinstance(layer, BottleneckLayer) and name in layer.scaling:
            found[f"{key}.down"] = layer.bottleneck_down[name]
            found[f"{key}.up"] = layer.bottleneck_up[name]
    return found


def masks(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    return {key: part.mask.clone() for key, part in projections(model, name).items() if isinstance(part, SparseLinear)}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny_batches(1)[0]["input_ids"]).logits


def train(model: nn.Module, num_steps: int = 3, **options: Any) -> None:
    model.train()
    optimizer = torch.optim.AdamW(trainable(model), **{"lr": 0.05, "weight_decay": 0.5, **options})
    for batch in tiny_batches(num_steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def assert_pruned_weights_are_zero(model: nn.Module) -> None:
    for key, part in projections(model).items():
        assert isinstance(part, SparseLinear), key
        assert not part.weight[~part.mask].any(), key


# --- masks ---


@pytest.mark.parametrize(
    ("scores", "sparsity", "expected"),
    [
        ([[3.0, 1.0], [2.0, 4.0]], 0.5, [[True, False], [False, True]]),
        ([[3.0, 1.0], [2.0, 4.0]], 0.25, [[True, False], [True, True]]),
        ([[3.0, 1.0], [2.0, 4.0]], 0.1, [[True, True], [True, True]]),
        ([[3.0, 1.0], [2.0, 4.0]], 0.99, [[False, False], [False, True]]),  # one weight is always kept
    ],
)
def test_the_smallest_scores_are_pruned(scores, sparsity, expected):
    assert kept(torch.tensor(scores), sparsity).tolist() == expected


@pytest.mark.parametrize("mode", ["series", "parallel"])
@pytest.mark.parametrize("pruning", ["random", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_every_projection_loses_its_fraction_and_outputs_stay_as_they_are(mode, pruning, sparsity):
    model = make_model(mode=mode, sparsity=sparsity, pruning=pruning)
    for part in projections(model).values():
        assert isinstance(part, SparseLinear)
        assert int((~part.mask).sum()) == round(sparsity * part.weight.numel())
    assert_pruned_weights_are_zero(model)
    assert torch.equal(logits(model), logits(tiny_llama(2)))


def test_magnitude_prunes_the_smallest_drawn_weights():
    base = nn.Sequential(nn.Linear(6, 6))
    torch.manual_seed(5)
    drawn = nn.Linear(6, 10, bias=False).weight.detach()
    config = BottleneckConfig(bottleneck_size=10, sparsity=0.4, pruning="magnitude", target_modules=["0"])
    torch.manual_seed(5)
    model: Any = get_peft_model(base, config)
    down = model.base_model.model[0].bottleneck_down["default"]
    threshold = drawn.abs().flatten().sort().values[24]
    assert torch.equal(down.mask, drawn.abs() >= threshold)
    assert torch.equal(down.weight, torch.where(drawn.abs() >= threshold, drawn, 0))


def test_masks_are_drawn_from_the_global_generator():
    first, again = masks(make_model(sparsity=0.5)), masks(make_model(sparsity=0.5))
    assert all(torch.equal(mask, again[key]) for key, mask in first.items())
    torch.manual_seed(2)
    other = masks(get_peft_model(tiny_llama(2, seed=7), BottleneckConfig(bottleneck_size=SIZE, sparsity=0.5)))
    assert not any(torch.equal(mask, other[key]) for key, mask in first.items())


def test_no_sparsity_changes_and_draws_nothing():
    config = BottleneckConfig(bottleneck_size=3, pruning="magnitude", target_modules=["0"])
    base = nn.Sequential(nn.Linear(6, 6))
    torch.manual_seed(5)
    model = get_peft_model(base, config)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    expected = nn.Linear(6, 3, bias=False).weight
    nn.Linear(3, 6, bias=False)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(projections(model)["base_model.model.0.down"].weight, expected)
    assert all(type(part) is nn.Linear for part in projections(model).values())
    assert not list(model.named_buffers())


# --- training ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_pruned_weights_never_move_and_kept_ones_do(make_optimizer, dtype):
    torch.manual_seed(1)
    config = BottleneckConfig(bottleneck_size=SIZE, sparsity=0.8)
    model = get_peft_model(tiny_llama(2).to(dtype), config, autocast_adapter_dtype=False).train()
    before, start = masks(model), {key: part.weight.detach().clone() for key, part in projections(model).items()}
    optimizer = make_optimizer(trainable(model), lr=0.05, weight_decay=0.5)
    for batch in tiny_batches(4):
        model(**batch).loss.backward()
        for part in projections(model).values():
            assert not part.weight.grad[~part.mask].any()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert_pruned_weights_are_zero(model)
    for key, part in projections(model).items():
        assert torch.equal(part.mask, before[key])
        assert part.weight.dtype == dtype
        moved = part.weight != start[key]
        assert torch.equal(moved, part.mask) or (moved & part.mask).sum() > 0.5 * part.mask.sum(), key


def test_a_gradient_that_is_not_finite_does_not_reach_pruned_weights():
    linear = SparseLinear(nn.Linear(2, 1, bias=False))
    linear.prune(torch.tensor([[True, False]]))
    (linear(torch.ones(1, 2)) * torch.inf).sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.tolist() == [[torch.inf, 0.0]]


def test_forward_equals_the_masked_product():
    torch.manual_seed(0)
    linear = SparseLinear(nn.Linear(5, 3, bias=False).double())
    mask = torch.rand(3, 5) > 0.5
    linear.prune(mask)
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(linear(x), x @ (linear.weight * mask).T, rtol=0, atol=1e-14)
    linear.weight.data.fill_(1.0)  # even where something wrote into pruned weights
    torch.testing.assert_close(linear(x), x @ mask.double().T, rtol=0, atol=1e-14)


def test_trains_under_autocast_and_in_a_layer_wise_tuner():
    model = make_model(sparsity=0.5).train()
    tuner = SparseTuner(model, num_active_layers=1, num_unsuppressed_layers=1, update_interval=2)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    for batch in tiny_batches(4):
        tuner.begin_step()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tuner.end_step(optimizer)
    tuner.close()
    assert tuner.last_update is not None
    assert_pruned_weights_are_zero(model)


# --- saving ---


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("pruning", ["random", "magnitude", "snip"])
def test_masks_are_saved_and_loaded_and_training_goes_on_under_them(pruning, low_cpu_mem_usage, tmp_path):
    model = make_model(sparsity=0 if pruning == "snip" else 0.7, pruning=pruning)
    if pruning == "snip":
        prune_adapter(model, tiny_batches(2), 0.7)
    train(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)  # other masks would be drawn
    loaded = PeftModel.from_pretrained(tiny_llama(2), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    before = masks(model)
    assert before.keys() == masks(loaded).keys() == projections(model).keys()
    assert all(torch.equal(mask, before[key]) for key, mask in masks(loaded).items())
    assert torch.equal(logits(loaded), logits(model))
    saved: Any = loaded.peft_config["default"]
    assert (saved.sparsity, saved.pruning) == (0.7, pruning)
    train(loaded)
    train(model)
    assert torch.equal(logits(loaded), logits(model))
    assert all(torch.equal(mask, before[key]) for key, mask in masks(loaded).items())
    assert_pruned_weights_are_zero(loaded)


def test_the_file_holds_masks_of_one_byte_only_for_sparse_adapters(tmp_path):
    make_model().save_pretrained(tmp_path / "dense")
    make_model(sparsity=0.5).save_pretrained(tmp_path / "sparse")
    dense = load_file(tmp_path / "dense" / "adapter_model.safetensors")
    sparse = load_file(tmp_path / "sparse" / "adapter_model.safetensors")
    added = sparse.keys() - dense.keys()
    assert len(dense) == 8  # two projections of two modules in two layers
    assert all(name.endswith((".bottleneck_down.weight", ".bottleneck_up.weight")) for name in dense)
    assert {name.replace(".mask", ".weight") for name in added} == dense.keys()
    assert {sparse[name].dtype for name in added} == {torch.bool}


def test_named_adapters_have_masks_of_their_own(tmp_path):
    model = make_model(sparsity=0.5)
    model.add_adapter("other", BottleneckConfig(bottleneck_size=SIZE, sparsity=0.25, pruning="magnitude"))
    model.add_adapter("dense", BottleneckConfig(bottleneck_size=SIZE))
    assert not masks(model, "dense")
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    loaded = PeftModel.from_pretrained(tiny_llama(2), tmp_path / "other")
    ours, theirs = masks(model, "other"), masks(loaded)
    assert all(torch.equal(mask, theirs[key]) for key, mask in ours.items())
    model.delete_adapter("other")
    assert not masks(model, "other")


def test_counts_are_of_all_weights():
    assert make_model(sparsity=0.8).get_nb_trainable_parameters() == make_model().get_nb_trainable_parameters()


def test_a_trainers_checkpoint_of_a_pruned_adapter_resumes_exactly(tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, learning_rate=0.01, report_to=[], use_cpu=True, disable_tqdm=True
    )
    model = make_model()
    prune_adapter(model, tiny_batches(2), 0.7)
    Trainer(model, arguments, train_dataset=tiny_rows()).train()  # pyright: ignore[reportArgumentType]
    resumed = make_model(sparsity=0.7, pruning="snip")  # makes room for the checkpoint's masks
    checkpoint = str(tmp_path / "checkpoint-2")
    Trainer(resumed, arguments, train_dataset=tiny_rows()).train(  # pyright: ignore[reportArgumentType]
        resume_from_checkpoint=checkpoint
    )
    ours, theirs = model.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert_pruned_weights_are_zero(resumed)


# --- SNIP ---


def test_scores_equal_finite_differences_of_the_loss():
    """`|w · ∂L/∂w|` without autograd: the loss at w(1 ± h), with the W_up that the call drew."""
    batches = [toy_batch(), {key: value.flip(0) * 0.5 for key, value in toy_batch().items()}]
    config = BottleneckConfig(
        bottleneck_size=3, non_linearity="tanh", target_modules=["up", "down"], output_modules=["down"]
    )
    model = get_peft_model(ToyModel(dropout=0.5).double(), config)
    twin = copy.deepcopy(model).eval()
    torch.manual_seed(4)
    prune_adapter(model, batches, 0.6)
    torch.manual_seed(4)
    for key, part in projections(twin).items():
        if key.endswith(".up"):
            nn.init.kaiming_uniform_(part.weight, a=5**0.5)
    scores, h = [], 1e-5
    for part in projections(twin).values():
        weights = part.weight.data.view(-1)
        for index, value in enumerate(weights.tolist()):
            losses = []
            for factor in (1 + h, 1 - h):
                weights[index] = value * factor
                with torch.no_grad():
                    losses.append(sum(twin(**batch)["loss"].item() for batch in batches))
            weights[index] = value
            scores.append(abs(losses[0] - losses[1]) / (2 * h))
    mask = torch.cat([part.flatten() for part in masks(model).values()])
    num_pruned = round(0.6 * len(scores))
    assert int((~mask).sum()) == num_pruned
    assert set((~mask).nonzero().flatten().tolist()) == set(torch.tensor(scores).argsort()[:num_pruned].tolist())


@pytest.mark.parametrize("options", [{}, {"sparsity": 0.5, "pruning": "snip"}], ids=["dense", "named beforehand"])
def test_pruning_leaves_no_trace_but_the_masks(options):
    model = make_model(dropout=0.3, **options).train()
    assert all(mask.all() for mask in masks(model).values())
    parameters = dict(model.named_parameters())
    before = snapshot(model)
    output = logits(model)
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    prune_adapter(model, tiny_batches(3), 0.5)
    after = dict(model.named_parameters())
    assert all(parameter is after[name] for name, parameter in parameters.items())  # an optimizer finds them
    assert all(parameter.grad is None for parameter in after.values())
    assert {name: module.training for name, module in model.named_modules() if name in modes} == modes
    for name, value in before.items():
        if "bottleneck_down" not in name:
            assert torch.equal(after[name], value), name
    for key, part in projections(model).items():
        if key.endswith(".down"):
            name = next(name for name, parameter in after.items() if parameter is part.weight)
            assert torch.equal(part.weight, torch.where(part.mask, before[name], 0))
    kept_weights = torch.cat([mask.flatten() for mask in masks(model).values()])
    assert int((~kept_weights).sum()) == round(0.5 * kept_weights.numel())
    assert torch.equal(logits(model), output)
    train(model)
    assert_pruned_weights_are_zero(model)
    assert not torch.equal(logits(model), output)


def test_an_adapter_that_is_frozen_is_pruned_and_stays_frozen():
    model = make_model(inference_mode=True)
    prune_adapter(model, tiny_batches(1), 0.5)
    assert not trainable(model)
    assert masks(model)


def test_only_the_named_adapter_is_pruned_though_settings_are_shared():
    config = BottleneckConfig(bottleneck_size=SIZE)
    torch.manual_seed(1)
    model: Any = get_peft_model(tiny_llama(2), config, adapter_name="first")
    model.add_adapter("second", config)
    model.set_adapter("second")
    prune_adapter(model, tiny_batches(1), 0.5, adapter_name="second")
    assert masks(model, "second")
    assert not masks(model, "first")
    assert [model.peft_config[name].sparsity for name in ("first", "second")] == [0.0, 0.5]


def test_a_loss_of_ones_own_counts():
    batches = tiny_batches(1)
    first, second = make_model(), make_model()
    prune_adapter(first, batches, 0.5)
    torch.manual_seed(1)
    prune_adapter(second, batches, 0.5, loss_function=lambda model, batch: model(**batch).logits[:, 0, 3].sum())
    assert not all(torch.equal(mask, masks(second)[key]) for key, mask in masks(first).items())


def raising(_: nn.Module, __: Any) -> Tensor:
    raise RuntimeError("no loss today")


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, {"sparsity": 1.0}, "sparsity=1.0 is not a fraction in [0, 1)"),
        ({}, {"sparsity": 0}, "sparsity=0 prunes nothing"),
        ({}, {"batches": []}, "batches is empty"),
        ({}, {"batches": tiny_batches(1)[0]}, "batches is one batch: give a list"),
        ({}, {"adapter_name": "other"}, "no bottleneck adapter 'other': it has default"),
        ({"sparsity": 0.5}, {}, "'default' is pruned already: make a new one with sparsity=0"),
        ({}, {"loss_function": lambda model, batch: model(**batch).logits}, "must return a tensor of one number"),
        ({}, {"loss_function": lambda model, batch: torch.tensor(1.0)}, "with a gradient"),
        ({}, {"loss_function": lambda model, batch: model(**batch).loss * torch.nan}, "score is not finite"),
        ({}, {"loss_function": raising}, "no loss today"),
    ],
)
def test_refusals_leave_the_model_as_it_was(options, call, message):
    model = make_model(**options).train()
    before, old = snapshot(model), masks(model)
    with pytest.raises((ValueError, RuntimeError)) as error:
        prune_adapter(model, **{"batches": tiny_batches(1), "sparsity": 0.5, **call})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    assert masks(model).keys() == old.keys()
    assert model.training
    assert model.peft_config["default"].pruning == "random"


def test_trained_inactive_and_missing_adapters_are_refused():
    model = make_model()
    with model.disable_adapter(), pytest.raises(ValueError, match="'default' is not active"):
        prune_adapter(model, tiny_batches(1), 0.5)
    model.add_adapter("other", BottleneckConfig(bottleneck_size=SIZE))
    with pytest.raises(ValueError, match=r"'other' is not active: call model\.set_adapter"):
        prune_adapter(model, tiny_batches(1), 0.5, adapter_name="other")
    train(model)
    with pytest.raises(ValueError, match=r"trained already \(W_up is not zero\)"):
        prune_adapter(model, tiny_batches(1), 0.5)
    with pytest.raises(ValueError, match="put one on with get_peft_model"):
        prune_adapter(tiny_llama(2), tiny_batches(1), 0.5)
