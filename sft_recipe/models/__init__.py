"""Where a model comes from, its tokenizer, its sizes, and how much memory it needs."""
