"""`ist train`."""
