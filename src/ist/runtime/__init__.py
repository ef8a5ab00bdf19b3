"""Plumbing that knows torch and not IST: processes, sharding, hooks, randomness, evaluation mode."""
