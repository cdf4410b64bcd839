"""Evaluation during training: the loss on validation data, generated answers and their scores."""
