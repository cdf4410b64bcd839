"""The ranks of one run: rendezvous, watchdog, consistency checks, signals."""
