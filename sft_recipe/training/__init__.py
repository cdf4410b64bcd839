"""The training loop: schedule, batches, verl's worker, and the metrics of a step."""
