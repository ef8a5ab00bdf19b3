"""Draws of dropout: what a mask depends on, from where the GPU's random generator stands."""

from __future__ import annotations

import torch

__all__ = ["Draw", "draw"]

Draw = tuple[int, int, int]
"""What dropout depends on: two numbers that make the hash, and a threshold."""
ALL = 2**64 - 1


def draw(device: torch.device, dropout: float) -> Draw:
    """A draw of dropout, from where the generator stands. It advances, as after any draw; whoever restores its state
    gets the same draw again.
    """
    generator = torch.cuda.default_generators[device.index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    bits = spread(generator.initial_seed(), offset)
    return signed(bits), signed(bits >> 32), signed(int(dropout * 2**32))


def spread(seed: int, offset: int) -> int:
    """64 bits of which each one depends on all of both: SplitMix64 (Steele, Lea, Flood 2014)."""
    bits = (seed + (offset + 1) * 0x9E3779B97F4A7C15) & ALL
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & ALL
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & ALL
    return bits ^ (bits >> 31)


def signed(bits: int) -> int:
    """The lower 32 bits as a number of this many bits with a sign, so that every draw has the same kind of argument."""
    bits &= 0xFFFFFFFF
    return bits - 2**32 if bits >= 2**31 else bits
