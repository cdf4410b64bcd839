"""From files to planned batches of token ids and loss masks; imports neither verl nor the engine."""
