"""Parts of prepare_speed.py. The run_*.py are started by path, the peers' in environments without this project."""
