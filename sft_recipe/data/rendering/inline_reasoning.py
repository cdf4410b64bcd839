"""Moves reasoning from the content of a turn to its own field, for templates that write a reasoning block."""

import re
from dataclasses import replace

from sft_recipe.data.messages import THOUGHT, Conversation, Message
from sft_recipe.data.rendering.chat_template import ChatTemplate, Refused
from sft_recipe.data.rendering.skeleton import SLOT

CLOSING_TAG = re.compile(r"</[\w:]+>")
ASKED, REASONING, ANSWER = (SLOT.format(name) for name in ("asked", "reasoning", "answer"))
INLINE = {"role": "assistant", "content": f"<think>\n{REASONING}\n</think>\n\n{ANSWER}"}


def has_inline_reasoning(message: Message) -> bool:
    """Return whether an assistant turn's content begins with reasoning in <think> tags."""
    return message.role == "assistant" and THOUGHT.match(message.content) is not None


def writes_own_block(template: ChatTemplate) -> bool:
    """Return whether the template closes another reasoning block before the reasoning in a turn's content.

    reasoning in its field     <|assistant|><think>hm</think>Hi
    reasoning in the content   <|assistant|><think></think><think>hm</think>Hi     the model would learn not to reason
    """
    own_field = {"role": "assistant", "content": ANSWER, template.reasoning_key: REASONING}
    in_content, in_field = (_tags_before_reasoning(template, turn) for turn in (INLINE, own_field))
    return in_content is not None and in_field is not None and in_content > in_field


def with_reasoning_fields(conversation: Conversation) -> Conversation:
    """Return the conversation with inline reasoning in its field, without white space at the edges."""
    messages = tuple(_lifted(message) for message in conversation.messages)
    return Conversation(messages, conversation.source, conversation.tools)


def _lifted(message: Message) -> Message:
    inline = THOUGHT.match(message.content) if message.role == "assistant" else None
    if not inline:
        return message
    content = message.content[inline.end() :].lstrip()
    return replace(message, content=content, reasoning=inline[2].strip()) if content or message.tool_calls else message


def _tags_before_reasoning(template: ChatTemplate, turn: dict[str, str]) -> int | None:
    """How many tags are closed between a user turn and the reasoning; None if not all is rendered, in this order."""
    try:
        text, _ = template.render([{"role": "user", "content": ASKED}, turn])
    except Refused:
        return None
    rendered = re.search(f"{ASKED}(.*?){REASONING}.*?{ANSWER}", text, re.DOTALL)
    return len(CLOSING_TAG.findall(rendered[1])) if rendered else None
