"""Removes the reasoning of a seeded fraction of the conversations, so that a model learns both ways to answer."""

from collections.abc import Collection
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from sft_recipe.data.messages import THOUGHT, Conversation, Message
from sft_recipe.data.rendering.chat_template import ChatTemplate
from sft_recipe.data.rendering.draws import draw
from sft_recipe.data.rendering.inline_reasoning import has_inline_reasoning


def mix_thinking(conversation: Conversation, share: float, seed: int, switches: Collection[str]) -> Conversation:
    """Return the conversation as it is, or without its reasoning, with the template's thinking `switches` set to match.

    The fraction `share` of the conversations with reasoning keep it. The choice depends on `seed` and the conversation
    alone; with a larger `share` the same conversations keep it and others do too. A conversation that sets a switch
    itself is returned unchanged.
    """
    if conversation.chat_template_kwargs.keys() & set(switches):
        return conversation
    if draw(conversation, seed, "reasoning") >= share:
        conversation = replace(conversation, messages=tuple(map(_without_reasoning, conversation.messages)))
    thinks = any(message.reasoning or has_inline_reasoning(message) for message in conversation.messages)
    return replace(
        conversation, chat_template_kwargs=conversation.chat_template_kwargs | dict.fromkeys(switches, thinks)
    )


def mix_notice(share: float | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a notice where nothing in the prompts of a mix shows which answers have reasoning.

    Raises ModelError for a chat template that cannot be used.
    """
    if not share or share == 1 or ChatTemplate(tokenizer).thinking_switches:
        return None
    return (
        f"data.thinking_mix is {share:g}, but the chat template has no thinking switch: nothing in the prompt shows "
        "which answers have reasoning, so that the model chooses by chance at inference. Use a template that has one "
        "(model.chat_template), or leave data.thinking_mix out."
    )


def _without_reasoning(message: Message) -> Message:
    """The message with its answer alone; reasoning without an answer stays, since nothing else would be left."""
    inline = THOUGHT.match(message.content) if message.role == "assistant" else None
    content = message.content[inline.end() :].lstrip() if inline else message.content
    return replace(message, content=content, reasoning="") if content.strip() or message.tool_calls else message
