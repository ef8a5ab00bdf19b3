"""What a run leaves behind: history, checkpoints, resume, fingerprint of the base, scores."""
