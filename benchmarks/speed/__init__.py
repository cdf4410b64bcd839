"""Parts of train_speed.py. What is under inside/ runs in the measured processes, whatever their environment."""
