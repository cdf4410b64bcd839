"""The run: loop, validation, checkpoints, progress."""
