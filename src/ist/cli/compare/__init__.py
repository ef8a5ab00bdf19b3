"""`ist compare`."""
