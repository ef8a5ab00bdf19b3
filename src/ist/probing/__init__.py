"""Equation 8 on probe batches: suppressed responses, their losses, and where the batches come from."""
