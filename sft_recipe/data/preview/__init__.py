"""Shows users the training data as training uses it, in the terminal and as an HTML page."""
