"""Runs the renderer over published chat templates, and checks every mask."""
