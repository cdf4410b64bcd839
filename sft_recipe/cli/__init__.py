"""Holds one module for each command, and the flags that they share."""
