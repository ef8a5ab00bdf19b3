"""Importance measured on probe batches: suppressed responses (eq. 8), their losses, and where the batches come from."""
