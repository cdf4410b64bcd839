"""Supervised fine-tuning on verl: exact masks, exact resume, configuration and data errors before training starts."""

__version__ = "0.1.0"
FORMAT_VERSION = 1  # of run folders: config.yaml, the rows of metrics.jsonl, and the manifests of checkpoints
