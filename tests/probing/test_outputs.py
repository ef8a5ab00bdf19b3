"""The mean norm of a token's output: by hand, for what blocks return, and without a trace afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from ist.probing.outputs import OutputNorms, output_norms
from tests.helpers.tiny import tiny_batches, tiny_llama


def test_output_norms_are_those_of_the_blocks() -> None:
    model = tiny_llama()
    (batch,) = tiny_batches(1)
    found = output_norms(model, list(model.model.layers), [batch])
    with torch.no_grad():
        hidden = model.eval().model(batch["input_ids"], output_hidden_states=True).hidden_states
    expected = [state.norm(dim=-1).mean().item() for state in hidden[1:-1]]
    assert found[:-1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_counts_for_no_token(side: str) -> None:
    """A row and its first half padded: as both without padding."""
    model = tiny_llama()
    blocks = list(model.model.layers)
    (batch,) = tiny_batches(1)
    row = batch["input_ids"][:1]
    half = row[:, : row.shape[1] // 2]
    padding = torch.zeros_like(row[:, half.shape[1] :])
    parts, masks = [half, padding], [torch.ones_like(half), padding]
    order = slice(None) if side == "right" else slice(None, None, -1)
    padded = torch.cat(parts[order], dim=1)
    mask = torch.cat([torch.ones_like(row), torch.cat(masks[order], dim=1)])
    ids = torch.cat([row, padded])
    found = output_norms(model, blocks, [{"input_ids": ids, "labels": ids, "attention_mask": mask}])
    alone = [output_norms(model, blocks, [{"input_ids": part, "labels": part}]) for part in (row, half)]
    tokens = (row.shape[1], half.shape[1])
    expected = [
        sum(n * value for n, value in zip(tokens, pair, strict=True)) / sum(tokens) for pair in zip(*alone, strict=True)
    ]
    assert found == pytest.approx(expected, rel=1e-5)


class Returns(nn.Module):
    """A block that returns its inputs in some form."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.form = form

    def forward(self, inputs: Any) -> Any:
        return self.form(inputs)


@pytest.mark.parametrize(
    "form",
    [
        lambda hidden: hidden,
        lambda hidden: (hidden, None),
        lambda hidden: [hidden],
        lambda hidden: {"hidden_states": hidden},
        lambda hidden: BaseModelOutput(last_hidden_state=hidden),
    ],
    ids=["tensor", "tuple", "list", "mapping", "transformers' output"],
)
def test_tokens_of_all_forwards_count_alike(form: Any) -> None:
    block, other = Returns(form), nn.Identity()
    with OutputNorms(nn.Sequential(block, other), [block, other]) as norms:
        block(torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]))  # norms 5 and 1
        block(torch.tensor([[[0.0, 3.0]]]))
    assert norms.means() == [3.0, 0.0]
    block(torch.ones(1, 2))
    assert norms.means() == [3.0, 0.0], "outside of the context nothing is added"
    assert not block._forward_hooks


@pytest.mark.parametrize("form", [lambda hidden: None, lambda hidden: (), lambda hidden: (None, hidden)])
def test_a_block_that_returns_no_tensor_is_one_line_and_leaves_no_hook(form: Any) -> None:
    block = Returns(form)
    with (
        pytest.raises(ValueError, match=r"A layer \(Returns\) returns a NoneType where") as error,
        OutputNorms(block, [block]),
    ):
        block(torch.ones(1, 2))
    assert "\n" not in str(error.value)
    assert not block._forward_hooks
