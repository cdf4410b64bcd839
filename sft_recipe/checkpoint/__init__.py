"""Checkpoints: state, manifest, saving beside training, and the lock of a run folder."""
