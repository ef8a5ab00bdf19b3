"""`ist eval`."""
