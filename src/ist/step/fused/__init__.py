"""Fused LoRA: one autograd function, which keeps nothing of frozen layers."""

from .modules import FusedLora, JoinError, RowFactors, Switch, reason_against, remove_fused

__all__ = ["FusedLora", "JoinError", "RowFactors", "Switch", "reason_against", "remove_fused"]
