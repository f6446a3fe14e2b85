"""The training loop and what it needs: data, losses, log, checkpoints of an unfinished run."""
