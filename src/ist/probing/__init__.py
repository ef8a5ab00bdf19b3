"""Importance measured on probe batches: by suppressed responses (eq. 8), or by gradients (`ist.focus`)."""
