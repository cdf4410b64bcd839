"""What a person watches and what a machine reads of a run: console, metrics.jsonl, loggers."""
