"""The trained model in the formats that others load."""
