"""Ranks as one run: rendezvous, watchdog, consistency checks, signals."""
