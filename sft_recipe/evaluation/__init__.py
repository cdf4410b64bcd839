"""Validation during training: the loss on held-out examples."""
