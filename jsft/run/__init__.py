"""The life of a run: its directory, loop, checkpoints and numbers."""
