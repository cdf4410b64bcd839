"""Checks that a chat template renders everything that a conversation contains."""

from typing import Any

from sft_recipe.data.rendering.chat_template import ChatTemplate, Messages, Refused, TemplateError
from sft_recipe.data.rendering.skeleton import SLOT, Skeleton


class ContentOmitted(TemplateError):
    """Says that the template leaves out a part of the conversation."""

    def __init__(self, part: str, advice: str = ""):
        super().__init__(
            f"omits {part}; {advice}remove it from the data, or use a template that renders it (model.chat_template)"
        )


def check_omissions(template: ChatTemplate, skeleton: Skeleton, text: str, slots: list[str]) -> frozenset[int]:
    """Raise ContentOmitted if `text`, the rendered skeleton with these `slots`, lacks a part of the conversation.

    Reasoning before the last assistant turn may be missing: templates drop it on purpose. Reasoning written into the
    content of the last turn may be missing as well. Returns the indices of the messages whose reasoning is missing.
    Raises TemplateError if the template changes a message.
    """
    last = max(index for index, message in enumerate(skeleton.messages) if message["role"] == "assistant")
    without_reasoning = set()
    for slot in [slot for slot in skeleton.slot_texts if slot not in slots]:
        prefix, _, kind = slot.partition(".")
        if kind.startswith("data"):
            continue
        index = int(prefix)
        message = skeleton.messages[index]
        if kind.startswith("think"):
            if template.reasoning_key in message and index == last:
                advice = "set data.enable_thinking=true, " if template.can_enable_thinking else ""
                raise ContentOmitted(f"messages[{index}].reasoning ({message['role']})", advice)
            without_reasoning.add(index)
            continue
        name = "tool_calls" if kind.startswith("call") else "content"
        if name == "content" and _depends_on_content(template, skeleton, index, text):
            raise TemplateError(f"changes messages[{index}].content ({message['role']})")
        folding_helps = message["role"] == "system" and template.accepts_folded_system(
            skeleton.messages, skeleton.tools
        )
        advice = "set data.fold_system=true, " if folding_helps else ""
        raise ContentOmitted(f"messages[{index}].{name} ({message['role']})", advice)
    _check_tools(template, skeleton, text)
    return frozenset(without_reasoning)


def omits_names(template: ChatTemplate, skeleton: Skeleton, text: str) -> bool:
    """Return whether `text`, the rendered skeleton, lacks the names of turns other than those of tools."""
    named = [message for message in skeleton.messages if "name" in message and message["role"] != "tool"]
    if not named:
        return False
    without = [
        {key: value for key, value in message.items() if key != "name"} if message in named else message
        for message in skeleton.messages
    ]
    return _renders_as(template, without, skeleton.tools, text)


def _check_tools(template: ChatTemplate, skeleton: Skeleton, text: str) -> None:
    """Tool schemas and arguments have no slots; a rendering without them must differ."""
    if skeleton.tools and _renders_as(template, skeleton.messages, skeleton.tools[:-1], text):
        raise ContentOmitted("some of the tools" if len(skeleton.tools) > 1 else "tools")
    for index, message in enumerate(skeleton.messages):
        emptied = _without_arguments(message)
        if emptied != message and not _changes(template, skeleton, index, emptied, text):
            raise ContentOmitted(f"the arguments of messages[{index}].tool_calls")


def _without_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [{**call, "function": {**call["function"], "arguments": {}}} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _depends_on_content(template: ChatTemplate, skeleton: Skeleton, index: int, text: str) -> bool:
    message = skeleton.messages[index]
    changed = {**message, "content": SLOT.format("other") + message["content"]}
    return _changes(template, skeleton, index, changed, text)


def _changes(template: ChatTemplate, skeleton: Skeleton, index: int, message: dict[str, Any], text: str) -> bool:
    """Return whether the skeleton with another message at this index has another text."""
    messages = [*skeleton.messages[:index], message, *skeleton.messages[index + 1 :]]
    return not _renders_as(template, messages, skeleton.tools, text)


def _renders_as(template: ChatTemplate, messages: Messages, tools: Messages, text: str) -> bool:
    """Return whether messages have this text; a template that refuses them depends on what was changed."""
    try:
        return template.render(messages, tools)[0] == text
    except Refused:
        return False
