"""Conversations and statistics for the tests of the preview."""

import numpy as np

from sft_recipe.data.messages import Conversation, Message
from sft_recipe.data.preview.stats import DatasetStats, Example, Settings
from sft_recipe.data.rendering.renderer import Encoded, Renderer


def conversation(*texts: str, source: str = "") -> Conversation:
    """Turns of user and assistant."""
    roles = ["user", "assistant"] * len(texts)
    return Conversation(tuple(Message(role, text) for role, text in zip(roles, texts, strict=False)), source)


def stats_of_masks(*masks: str, **settings) -> DatasetStats:
    """Statistics of examples given by their masks: "0011" has four tokens, the last two supervised."""
    result = DatasetStats(Settings(**settings))
    for number, mask in enumerate(masks, 1):
        bits = [int(bit) for bit in mask]
        ids = [7] * len(bits) if number % 2 else [8] * len(bits)
        result.add(conversation("Hi", "Yes", source=f"a.json, record {number}"), Encoded(ids, bits))
    return result


def stats_of(records, renderer: Renderer, settings: Settings | None = None) -> DatasetStats:
    """Statistics of records as they are read from files."""
    result = DatasetStats(settings or Settings())
    result.read(records, renderer)
    return result


def example_of(renderer, *texts: str) -> Example:
    talk = conversation(*texts)
    return Example(0, talk, renderer.encode(talk))


def decoded_turns(tokenizer, example: Example) -> list[str]:
    ids, mask = example.encoded.input_ids, example.encoded.loss_mask
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    return [tokenizer.decode(ids[start:stop]) for start, stop in edges.reshape(-1, 2)]
