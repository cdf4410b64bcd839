"""Checkpoints: state, manifest, saving during training, and the lock of a run folder."""
