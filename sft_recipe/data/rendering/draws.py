"""Seeded choices of conversations: which get a system prompt, lose an empty thought, or keep their reasoning."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace

from sft_recipe.data.messages import Conversation, Message
from sft_recipe.data.rendering.annotate import AnnotatedText
from sft_recipe.files import digest_number

# What templates write for an assistant turn without reasoning.
EMPTY_THOUGHT = re.compile(r"<think>\n\n</think>\n\n")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a careful assistant who answers correctly and to the point.",
    "You are a friendly assistant. Explain things so that everyone understands them.",
    "Answer the user's questions as well as you can.",
    "You are an AI model that helps people with questions and tasks of all kinds.",
    "你是一个乐于助人的助手。",
    "你是一个认真的助手，请给出准确、简洁的回答。",
    "你是一个友好的助手，请用通俗易懂的语言解释问题。",
    "请尽力回答用户的问题。",
    "你是一个人工智能模型，可以帮助人们解决各种问题。",
)


def draw(conversation: Conversation, seed: int, purpose: str) -> float:
    """Return a number from 0 to 1 that depends on the arguments alone."""
    text = json.dumps([seed, purpose, conversation.as_record()], sort_keys=True)
    return digest_number(text.encode()) / 2**64


def with_system_prompt(
    conversation: Conversation, share: float, seed: int, prompts: Sequence[str] = SYSTEM_PROMPTS
) -> Conversation:
    """Return the conversation, with one of `prompts` in front for the fraction `share` of those that have none.

    Conversations with tools, whose template writes a system turn, are returned as they are.
    """
    if conversation.tools or conversation.messages[0].role == "system":
        return conversation
    drawn = draw(conversation, seed, "system prompt")
    if drawn >= share:
        return conversation
    prompt = Message("system", prompts[int(drawn / share * len(prompts))])
    return replace(conversation, messages=(prompt, *conversation.messages))


def without_empty_thoughts(annotated: AnnotatedText) -> AnnotatedText:
    """Return the text without its empty thoughts, and the spans where they are then."""
    blocks = [match.span() for match in EMPTY_THOUGHT.finditer(annotated.text)]

    def moved(position: int) -> int:
        return position - sum(min(position, end) - start for start, end in blocks if start < position)

    spans = [(moved(start), moved(end)) for start, end in annotated.spans]
    return replace(annotated, text=EMPTY_THOUGHT.sub("", annotated.text), spans=spans)
