"""A step that is sparse and cheap: activation, depth of the backward, recomputation, fused LoRA."""
