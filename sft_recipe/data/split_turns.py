"""Splits conversations into one example per assistant turn, each rendered as at inference (data.split_turns)."""

import json
from collections.abc import Iterator
from dataclasses import replace

from sft_recipe.data.messages import Conversation
from sft_recipe.files import digest_number


def split_turns(conversation: Conversation) -> Iterator[Conversation]:
    """Yield, for each assistant turn that is trained on, the conversation up to it, in which it alone is trained on.

    user, assistant, user, assistant    ->    user, assistant*    and    user, assistant, user, assistant*

    A conversation without such a turn is yielded as it is. Keys that are not read are counted with the last example.
    """
    messages = conversation.messages
    turns = [index for index, message in enumerate(messages) if message.role == "assistant" and message.train]
    if not turns:
        yield conversation
    for index in turns:
        before = tuple(replace(m, train=False) if m.role == "assistant" else m for m in messages[:index])
        unread = conversation.unread if index == turns[-1] else ()
        yield replace(conversation, messages=(*before, messages[index]), unread=unread)


def group_of(example: Conversation) -> int:
    """Return a 64-bit digest of an example up to its first assistant turn: equal for all examples of a conversation."""
    record = example.as_record()
    first = next(index for index, message in enumerate(example.messages) if message.role == "assistant")
    turns = [{key: value for key, value in turn.items() if key != "train"} for turn in record["messages"][: first + 1]]
    text = json.dumps({**record, "messages": turns}, sort_keys=True)
    return digest_number(text.encode())
