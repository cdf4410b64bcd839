"""Moves reasoning from the content of a turn to its own field, for templates that write a reasoning block."""

import re
from dataclasses import replace

from sft_recipe.data.messages import THOUGHT, Conversation, Message
from sft_recipe.data.rendering.chat_template import ChatTemplate, Refused
from sft_recipe.data.rendering.skeleton import SLOT

# </think>, </mm:think>, </think:opensource>
CLOSED_REASONING = re.compile(r"</[\w:]*(think|thought|reason)[\w:]*>")
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
    if not template.reads_reasoning:
        return False
    try:
        text, _ = template.render([{"role": "user", "content": ASKED}, INLINE])
    except Refused:
        return False
    before = re.search(f"{ASKED}(.*){REASONING}", text, re.DOTALL)
    return before is not None and CLOSED_REASONING.search(before[1]) is not None


def with_reasoning_fields(conversation: Conversation) -> Conversation:
    """Return the conversation with inline reasoning in its field, without white space at the edges."""
    messages = tuple(_lifted(message) for message in conversation.messages)
    return replace(conversation, messages=messages)


def _lifted(message: Message) -> Message:
    inline = THOUGHT.match(message.content) if message.role == "assistant" else None
    if not inline:
        return message
    content = message.content[inline.end() :].lstrip()
    return replace(message, content=content, reasoning=inline[2].strip()) if content or message.tool_calls else message
