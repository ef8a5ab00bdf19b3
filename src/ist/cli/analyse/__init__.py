"""`ist analyse`."""
