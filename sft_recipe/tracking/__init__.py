"""What a run reports: banner and messages on the console, metrics.jsonl, and verl's loggers."""
