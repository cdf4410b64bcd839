"""Turns the configurations of other projects into overrides of ours: LLaMA-Factory, axolotl, TRL and verl."""
