"""All candidate sets in one forward: the losses of one forward for each, and set by set where that is not right."""

from __future__ import annotations

from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ist import SparseTuner
from ist.probing.batched import MAX_COMPARED, MAX_TOKENS, BatchedLosses, batched_losses, fits
from ist.probing.measurement import Measurement
from ist.probing.suppression import candidate_losses
from ist.step.fused import JoinError
from tests.helpers.tiny import snapshot, tiny_batches, tiny_lora, traces

CANDIDATES = [(0, 1), (1, 3), (0, 2)]


def padded() -> dict[str, Tensor]:
    """A batch whose rows are of different lengths."""
    batch = {**tiny_batches(1, size=5)[0]}
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 8:] = 0
    mask[2, 5:] = 0
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


BATCHES = {"plain": lambda: tiny_batches(1, size=5)[0], "padded": padded}
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rank-stabilised": {"use_rslora": True},
    "bias of B": {"lora_bias": True, "target_modules": ["q_proj", "up_proj"]},
    "dropout": {"lora_dropout": 0.3},
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("beta", [0.25, 0.0, 1.0])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_losses_are_those_of_one_forward_for_each(adapter: str, batch: str, beta: float) -> None:
    model = tiny_lora(**ADAPTERS[adapter]).double().train()
    if adapter == "bias of B":
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                parameter.data.normal_()
    given = BATCHES[batch]()
    with SparseTuner(model, probe_batches=[given]) as tuner:
        expected = candidate_losses(model, tuner.layers, CANDIDATES, given, beta)
        before = traces(model)
        with tuner._parts.activation.measuring():
            found = batched_losses(model, tuner.layers, CANDIDATES, given, beta)
        assert traces(model) == before
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert beta == 1 or len({round(loss, 6) for loss in found.tolist()}) == len(CANDIDATES)


def learned(**options: Any) -> tuple[list[float], dict[str, Tensor], list[int]]:
    """Importance and adapters after some steps, and how many forwards each update took."""
    model = tiny_lora().double()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += not torch.is_grad_enabled()

    model.register_forward_pre_hook(count)
    counts = []
    with SparseTuner(
        model, probe_batches=tiny_batches(5, size=5, seed=2), update_interval=2, mu=50.0, **options
    ) as tuner:
        for batch in tiny_batches(8):
            tuner.begin_step()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            before = forwards
            if tuner.end_step(optimizer):
                counts.append(forwards - before)
        return tuner.selector.state_dict()["importance"], snapshot(model), counts


def test_learns_what_is_learned_set_by_set() -> None:
    """The first update does both, to compare; the others take one forward."""
    importance, adapters, counts = learned()
    expected, expected_adapters, counts_one_by_one = learned(fused=False)
    assert counts == [4, 1, 1, 1]
    assert counts_one_by_one == [3, 3, 3, 3]
    assert importance == pytest.approx(expected, rel=1e-9)
    for name, value in adapters.items():
        torch.testing.assert_close(value, expected_adapters[name], rtol=1e-9, atol=1e-12)


def joint_or_one_by_one(model: Any, tuner: SparseTuner) -> BatchedLosses:
    return BatchedLosses(
        tuner._view, 0.25, lambda sets, batch: candidate_losses(model, tuner.layers, sets, batch, 0.25)
    )


def test_a_model_whose_loss_is_another_one_is_measured_set_by_set() -> None:
    model = tiny_lora().double()
    batch = tiny_batches(1, size=5)[0]
    inner: Any = model.get_base_model()
    forward = inner.forward

    def with_a_penalty(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 1
        return outputs

    inner.forward = with_a_penalty
    with SparseTuner(model, probe_batches=[batch]) as tuner, tuner._parts.activation.measuring():
        expected = candidate_losses(model, tuner.layers, CANDIDATES, batch, 0.25)
        joint = joint_or_one_by_one(model, tuner)
        assert torch.equal(joint(CANDIDATES, batch), expected)
        assert joint.trusted is False
        assert torch.equal(joint(CANDIDATES, batch), expected)


def test_a_model_that_gives_no_logits_without_labels_is_measured_set_by_set() -> None:
    """Such as an encoder–decoder, which makes its decoder's inputs from them."""
    model = tiny_lora().double()
    batch = tiny_batches(1, size=5)[0]
    inner: Any = model.get_base_model()
    forward = inner.forward

    def with_labels_alone(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is None:
            raise ValueError("no inputs of a decoder")
        return forward(*args, **kwargs)

    inner.forward = with_labels_alone
    with SparseTuner(model, probe_batches=[batch]) as tuner, tuner._parts.activation.measuring():
        expected = candidate_losses(model, tuner.layers, CANDIDATES, batch, 0.25)
        joint = joint_or_one_by_one(model, tuner)
        assert torch.equal(joint(CANDIDATES, batch), expected)
        assert joint.trusted is False
        with pytest.raises(ValueError, match="no inputs of a decoder"):
            joint(CANDIDATES, {"input_ids": batch["input_ids"]})


def test_rows_that_lie_elsewhere_are_measured_set_by_set() -> None:
    """A model may compute with tokens first; its losses are near those of one forward, and say nothing of the sets."""
    model = tiny_lora().double()
    square, batch = tiny_batches(1)[0], tiny_batches(1, size=5)[0]
    assert square["input_ids"].shape[0] * len(CANDIDATES) == square["input_ids"].shape[1]
    for layer in model.get_base_model().model.layers:
        mlp = layer.mlp

        def turned(x: Tensor, forward: Any = mlp.forward) -> Tensor:
            return forward(x.transpose(0, 1)).transpose(0, 1)

        mlp.forward = turned
    with SparseTuner(model, probe_batches=[batch]) as tuner, tuner._parts.activation.measuring():
        joint = joint_or_one_by_one(model, tuner)
        for given, trusted in ((square, None), (batch, False)):
            expected = candidate_losses(model, tuner.layers, CANDIDATES, given, 0.25)
            assert torch.equal(joint(CANDIDATES, given), expected)
            assert joint.trusted is trusted


def test_a_loss_of_routers_is_measured_set_by_set() -> None:
    model = tiny_lora().double()
    batch = tiny_batches(1, size=5)[0]
    inner: Any = model.get_base_model()
    forward = inner.forward

    def with_an_auxiliary_loss(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        outputs.aux_loss = torch.ones(())
        return outputs

    inner.forward = with_an_auxiliary_loss
    with (
        SparseTuner(model, probe_batches=[batch]) as tuner,
        tuner._parts.activation.measuring(),
        pytest.raises(JoinError, match="elsewhere than the logits"),
    ):
        batched_losses(model, tuner.layers, CANDIDATES, batch, 0.25)


def test_nothing_is_decided_by_losses_that_are_no_numbers_and_a_resume_knows_what_was_decided() -> None:
    empty, full = ({**batch, "labels": batch["labels"].clone()} for batch in tiny_batches(2, size=5))
    empty["labels"][:] = -100
    model = tiny_lora()
    with SparseTuner(model, probe_batches=[empty, full]) as tuner:
        assert tuner._measure(CANDIDATES) is not None
        assert tuner.state_dict()["batched_trusted"] is None
        tuner._measure(CANDIDATES)
        state = tuner.state_dict()
    assert state["batched_trusted"] is True
    for decided in (True, False):
        with SparseTuner(model, probe_batches=[full]) as tuner:
            tuner.load_state_dict({**state, "batched_trusted": decided})
            assert tuner._measurement.batched_trusted is decided


def ids(rows: int, tokens: int) -> Tensor:
    return torch.zeros(rows, tokens, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"input_ids": ids(2, 8), "labels": ids(2, 8)}, True),
        ({"input_ids": ids(2, 8), "labels": ids(2, 8), "attention_mask": ids(2, 8)}, True),
        ({"input_ids": ids(2, 8)}, False),
        ({"input_ids": ids(2, 8), "labels": ids(2, 1)}, False),
        ({"input_ids": ids(1, 8), "labels": ids(1, 8), "position_ids": ids(1, 8)}, False),
        ({"input_ids": ids(1, 8), "labels": ids(1, 8), "num_items": 3}, False),
        ({"input_ids": ids(1, MAX_TOKENS // 3), "labels": ids(1, MAX_TOKENS // 3)}, True),
        ({"input_ids": ids(2, MAX_TOKENS // 3), "labels": ids(2, MAX_TOKENS // 3)}, False),
        ({"pixel_values": torch.zeros(2, 3, 4, 4), "labels": ids(2, 8)}, False),
    ],
)
def test_batches_that_can_be_laid_out(batch: dict[str, Any], expected: bool) -> None:
    assert fits(batch, 3) is expected


@pytest.mark.parametrize("change", ["DoRA", "merged", "no loss of its own"])
def test_what_cannot_be_computed_so_is_said(change: str) -> None:
    model: Any = tiny_lora(use_dora=change == "DoRA")
    batch = tiny_batches(1, size=5)[0]
    with SparseTuner(model, probe_batches=[batch]) as tuner, tuner._parts.activation.measuring():
        if change == "merged":
            model.merge_adapter()
        asked: Any = SimpleNamespace(get_base_model=lambda: None) if change == "no loss of its own" else model
        with pytest.raises(JoinError):
            batched_losses(asked, tuner.layers, CANDIDATES, batch, 0.25)
        if change == "merged":
            model.unmerge_adapter()
    factors = [module.__dict__.get("_ist_factors") for module in model.modules()]
    assert factors == [None] * len(factors)


def test_a_loss_of_the_users_own_is_computed_set_by_set() -> None:
    options: Any = {"loss_function": lambda model, batch: model(**batch).loss, "probe_batches": tiny_batches(1)}
    with SparseTuner(tiny_lora(), **options) as tuner:
        measurement: Measurement = tuner._measurement
        assert measurement._batched is None


# ---- Trust, which is decided by how far the candidates lie apart


def reading_mlp(module: Any, x: Tensor) -> Tensor:
    """An MLP that computes with the weights of its LoRA modules itself, past their forwards, as Unsloth's do."""

    def lora(x: Tensor, part: Any) -> Tensor:
        a, b = part.lora_A["default"].weight, part.lora_B["default"].weight
        return part.base_layer(x) + x @ a.T @ b.T * part.scaling["default"]

    return lora(module.act_fn(module.gate_proj(x)) * lora(x, module.up_proj), module.down_proj)


def responding(scale: float) -> Any:
    """A model whose adapters respond, in double precision."""
    model = tiny_lora(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]).double()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=scale, generator=generator)
    return model


@pytest.mark.parametrize(
    ("scale", "shift", "trusted"),
    [(0.5, 0.0, True), (0.0, 0.0, None), (1e-4, 1e-3, None), (0.5, 1.0, False)],
    ids=["the candidates lie apart", "no response yet", "an error beyond their spread", "another loss"],
)
def test_one_forward_is_trusted_by_the_candidates_spread(scale: float, shift: float, trusted: bool | None) -> None:
    batch = tiny_batches(1, size=5)[0]
    model = responding(scale)
    with SparseTuner(model, probe_batches=[batch]) as tuner, tuner._parts.activation.measuring():
        alone = candidate_losses(model, tuner.layers, CANDIDATES, batch, 0.25)
        alone = alone + torch.tensor([0.0, shift, 0.0])
        joint = BatchedLosses(tuner._view, 0.25, lambda *_: alone)
        found = joint(CANDIDATES, batch)
        assert joint.trusted is trusted
        torch.testing.assert_close(found, alone, rtol=1e-12, atol=0)
        if trusted is None:
            joint(CANDIDATES, batch, MAX_COMPARED)
            assert joint.trusted is False, "what has not been decided for so long is measured set by set"


def test_blocks_that_read_the_weights_are_measured_set_by_set() -> None:
    model = responding(0.5)
    for block in model.get_base_model().model.layers:
        block.mlp.forward = MethodType(reading_mlp, block.mlp)
    batch = tiny_batches(1, size=5)[0]
    with SparseTuner(model, probe_batches=[batch]) as tuner, tuner._parts.activation.measuring():
        expected = candidate_losses(model, tuner.layers, CANDIDATES, batch, 0.25)
        joint = joint_or_one_by_one(model, tuner)
        assert torch.equal(joint(CANDIDATES, batch), expected)
        assert joint.trusted is not True
