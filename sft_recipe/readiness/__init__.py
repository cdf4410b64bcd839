"""Checks before a run whether it is ready: machine, data, model, plan and memory, each as ok, warning or error."""
