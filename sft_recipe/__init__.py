"""Supervised fine-tuning on verl: exact masks, exact resume, trouble told early."""

__version__ = "0.1.0"
