"""Why FSDP2's backward must gather nothing that it does not get to: PyTorch's own stream passes over CUDA's events.

At the end of a backward FSDP2 calls `torch.accelerator.current_stream().wait_event(event)` for a gather that nobody
came to use (`FSDPParamGroup.finalize_backward`, of a mistargeted prefetch). The event is a `torch.cuda.Event`, the
stream a `torch.Stream`, and the buffer is given back at once. `ist.step.prefetch` leaves no such gather.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LONG = 2 * 10**9
"""Cycles of a kernel that takes about a second."""


def waits(wait: Callable[[Any], object]) -> bool:
    """Whether `wait(event)` makes the current stream wait for what another stream writes before the event."""
    number, side, event = torch.zeros(1, device="cuda"), torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        number.fill_(1)
        event.record()
    wait(event)
    seen = number.clone()
    torch.cuda.synchronize()
    return bool(seen)


def test_a_stream_of_cuda_waits_for_an_event_of_cuda() -> None:
    assert waits(torch.cuda.current_stream().wait_event)
    assert not waits(lambda event: None)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="where it waits, FSDP2's unused gathers are safe")
def test_a_stream_of_pytorch_does() -> None:
    """It does not, and so `ist.step.prefetch` is needed: this PyTorch is to say so where it is mended."""
    assert waits(torch.accelerator.current_stream().wait_event)
