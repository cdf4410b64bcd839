"""Talks to trained models: in the terminal, over lists of prompts, and as an OpenAI-compatible server."""
