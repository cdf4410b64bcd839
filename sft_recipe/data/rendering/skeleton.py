"""Skeletons: conversations with a slot in place of each text.

A chat template that renders a skeleton shows where it puts each text. The result holds for all conversations with
the same skeleton.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from sft_recipe.data.messages import THOUGHT, Conversation
from sft_recipe.data.rendering.chat_template import ChatTemplate, TemplateError

# A slot is a name between two Unicode noncharacters. "3.think0" is the reasoning of messages[3]. The other kinds
# are text, call (the name of a called tool), and data (text in any other field that spells a special token).
SLOT = "\ufdd0{}\ufdd1"
SLOT_PATTERN = re.compile("\ufdd0([a-z0-9.]+)\ufdd1")
# Templates that search for "</think>" take all text before it as reasoning: the generation prompt may open the tag.
REASONING_BEFORE_CLOSING_TAG = re.compile(r"(\s*(?:<think>)?)(.*?)(</think>)", re.DOTALL)


@dataclass(frozen=True)
class Skeleton:
    """Holds a conversation with slots in place of its texts, and the text of each slot.

    Texts keep what a template may inspect: white space at the edges, and the template's sentinels.

    content "<think>hm</think>\\n\\nHi"  ->  "<think>[1.think0]</think>\\n\\n[1.text1]"
                                          slot_texts {"1.think0": "hm", "1.text1": "Hi"}
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    slot_texts: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for conversations that differ in the texts of their slots alone."""
        parts = [repr(self.tools)] if self.tools else []
        for message in self.messages:
            for name, value in message.items():
                parts += name, value if isinstance(value, str) else repr(value)
        return tuple(parts)


class Skeletonizer:
    """Makes skeletons; with `escapes_special`, all text that spells a special token becomes a slot."""

    def __init__(self, template: ChatTemplate, escapes_special: bool):
        self.template = template
        self.special_pattern = template.special_pattern if escapes_special else re.compile("(?!)")
        self.reasoning_pattern = REASONING_BEFORE_CLOSING_TAG if "</think>" in template.source else THOUGHT

    def skeleton(self, conversation: Conversation, verbatim_roles: Collection[str] = ()) -> Skeleton:
        """Return the skeleton of a conversation.

        Turns of `verbatim_roles` keep their content, for templates that inspect or change it. Raises TemplateError
        if text that is kept contains U+FDD0.
        """
        skeleton = Skeleton()
        ids: dict[str, str] = {}
        for index, message in enumerate(conversation.messages):
            turn = message.as_dict()
            slots = _Slots(skeleton.slot_texts, f"{index}.")
            if message.reasoning:
                turn.pop("reasoning_content")
                turn[self.template.reasoning_key] = slots.insert(message.reasoning, "think")
            if message.role in verbatim_roles:
                turn["content"] = self._verbatim(message.content, slots)
            else:
                may_reason = message.role == "assistant" and not message.reasoning
                reasoning = self.reasoning_pattern.match(message.content) if may_reason else None
                turn["content"] = self._content(message.content, reasoning, slots)
            if message.tool_calls:
                turn["tool_calls"] = [self._call(call, slots, ids) for call in message.tool_calls]
            for name in ("name", "tool_call_id"):
                if name in turn:
                    turn[name] = ids.get(turn[name]) or self._verbatim(turn[name], slots)
            skeleton.messages.append(turn)
        if conversation.tools:
            slots = _Slots(skeleton.slot_texts, "tools.")
            skeleton.tools.extend(self._verbatim(tool, slots) for tool in conversation.tools)
        return skeleton

    def has_special_text(self, skeleton: Skeleton) -> bool:
        """Return whether the text of any slot spells a special token that must stay text."""
        return any(self.special_pattern.search(text) for text in skeleton.slot_texts.values())

    def _content(self, content: str, reasoning: re.Match[str] | None, slots: "_Slots") -> str:
        before = ""
        if reasoning:
            opening, text, closing = reasoning.groups()
            before, content = opening + slots.insert(text, "think") + closing, content[reasoning.end() :]
        pieces = self.template.sentinel_pattern.split(content)  # pieces at odd indices are sentinels
        if len(pieces) > 1 and not "".join(pieces[::2]).strip():
            pieces = [content]  # the content consists of sentinels alone
        for index in range(0, len(pieces), 2):
            pieces[index] = slots.insert(pieces[index], "text")
        return before + "".join(pieces)

    def _call(self, call: dict[str, Any], slots: "_Slots", ids: dict[str, str]) -> dict[str, Any]:
        """A call with a slot as the name, also inside its id: some templates show the id `functions.NAME:0` alone.

        Ids that contain a slot are added to `ids`, by the id, for the results that name them.
        """
        function = call["function"]
        name = slots.insert(function["name"], "call")
        fields = {key: self._verbatim(value, slots) for key, value in function.items() if key != "name"}
        rest = {key: self._verbatim(value, slots) for key, value in call.items() if key != "function"}
        identifier = call.get("id")
        if isinstance(identifier, str) and rest["id"] == identifier and function["name"].strip():
            rest["id"] = re.sub(rf"\b{re.escape(function['name'])}\b", lambda match: name, identifier, count=1)
            if rest["id"] != identifier:
                ids[identifier] = rest["id"]
        return {**rest, "function": {"name": name, **fields}}

    def _verbatim(self, value: Any, slots: "_Slots") -> Any:
        """A JSON value unchanged, except that text which spells a special token becomes a slot."""
        if isinstance(value, str):
            if "\ufdd0" in value:
                raise TemplateError(
                    "cannot be applied to text with the Unicode noncharacter U+FDD0; remove it from the data"
                )
            return self.special_pattern.sub(lambda match: slots.insert(match[0], "data"), value)
        if isinstance(value, dict):
            return {self._verbatim(key, slots): self._verbatim(item, slots) for key, item in value.items()}
        return [self._verbatim(item, slots) for item in value] if isinstance(value, list) else value


class _Slots:
    """Names the slots of one message, and collects their texts."""

    def __init__(self, slot_texts: dict[str, str], prefix: str):
        self.slot_texts, self.prefix, self.count = slot_texts, prefix, 0

    def insert(self, text: str, kind: str) -> str:
        """The text with a slot in place of everything except the white space at its edges."""
        core = text.strip()
        if not core:
            return text
        name = f"{self.prefix}{kind}{self.count}"
        self.count += 1
        self.slot_texts[name] = core
        return text.replace(core, SLOT.format(name), 1)


def split_at_slots(rendered: str) -> tuple[list[str], list[str]]:
    """Return the literal text around the slots of a rendered skeleton, and the names of the slots.

    "U: [0.text0]</s>"  ->  ["U: ", "</s>"], ["0.text0"]
    """
    pieces = SLOT_PATTERN.split(rendered)
    return pieces[::2], pieces[1::2]
