"""Launchers start the ranks of a run."""
