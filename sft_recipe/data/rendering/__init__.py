"""From a conversation to token ids and a loss mask."""
