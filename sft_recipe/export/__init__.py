"""Export: the trained model in the formats that other programs load."""
