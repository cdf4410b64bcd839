"""Where a chat template puts what: found once for all conversations of a shape, and checked against each."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import accumulate
from os.path import commonprefix
from typing import Any

from sft_recipe.data.messages import THOUGHT, Conversation
from sft_recipe.data.rendering.chat_template import Problem, Span, Template
from sft_recipe.data.rendering.escaping import SpecialTokenEscaper
from sft_recipe.errors import ModelError

# A slot stands for a text in a rendering: a name between two code points that Unicode gives to no character.
# "3.thought0" is the thought of messages[3]; the others are text, call (the name of a called tool), and data, which
# stands for text anywhere that spells a special token.
SLOT = "\ufdd0{}\ufdd1"
# What templates that look for </think> take for a thought: its opening may stand in the generation prompt.
UNOPENED_THOUGHT = re.compile(r"(\s*(?:<think>)?)(.*?)(</think>)", re.DOTALL)
FIND_SLOT = re.compile("\ufdd0([a-z0-9.]+)\ufdd1")
CLOSING_TAG = re.compile(r"\s*</\w+>\s*")
OPENED_THOUGHT = re.compile(r"\s*(<\w+>\s*(</\w+>\s*)?)?")

Place = tuple[int, int]  # the number of a literal, and an offset in it


class NotShown(Problem):
    """The template leaves out something that was said."""

    def __init__(self, what: str):
        super().__init__(
            f"does not show {what}; leave it out of the data, or give a template that shows it (model.chat_template)"
        )


@dataclass(frozen=True)
class Skeleton:
    """A conversation with slots in place of what is said, and what each slot stands for.

    What a template may look at stays: white space at the edges, and the strings that it looks for.

    "<think>hm</think>\\n\\nHi"  ->  "<think>[1.thought0]</think>\\n\\n[1.text1]", {"1.thought0": "hm", "1.text1": "Hi"}
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    slot_texts: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for equal shapes, whatever is said in them."""
        parts = [repr(self.tools)] if self.tools else []
        for message in self.messages:
            for name, value in message.items():
                parts += name, value if isinstance(value, str) else repr(value)
        return tuple(parts)


class Skeletonizer:
    """Makes shapes; with `guards_special`, all data that spells a special token stands in slots."""

    def __init__(self, template: Template, escapes_special: bool):
        self.template = template
        self.special = template.special if escapes_special else re.compile("(?!)")
        self.reasoning = UNOPENED_THOUGHT if "</think>" in template.text else THOUGHT

    def skeleton(self, conversation: Conversation, kept: Collection[str] = ()) -> Skeleton:
        """What those of the `kept` roles say stays, for templates that look at it or change it."""
        skeleton = Skeleton()
        for index, message in enumerate(conversation.messages):
            turn = message.as_dict()
            slots = _Slots(skeleton.slot_texts, f"{index}.")
            if message.reasoning:
                turn.pop("reasoning_content")
                turn[self.template.reasoning_key] = slots.around(message.reasoning, "thought")
            if message.role in kept:
                turn["content"] = self._data(message.content, slots)
            else:
                thinks = message.role == "assistant" and not message.reasoning
                reasoning = self.reasoning.match(message.content) if thinks else None
                turn["content"] = self._content(message.content, reasoning, slots)
            if message.tool_calls:
                turn["tool_calls"] = [self._call(call, slots) for call in message.tool_calls]
            for name in ("name", "tool_call_id"):
                if name in turn:
                    turn[name] = self._data(turn[name], slots)
            skeleton.messages.append(turn)
        if conversation.tools:
            slots = _Slots(skeleton.slot_texts, "tools.")
            skeleton.tools.extend(self._data(tool, slots) for tool in conversation.tools)
        return skeleton

    def has_special_text(self, skeleton: Skeleton) -> bool:
        """Whether anything that is said spells a special token that it must not become."""
        return any(self.special.search(text) for text in skeleton.slot_texts.values())

    def _content(self, content: str, reasoning: re.Match[str] | None, slots: "_Slots") -> str:
        before = ""
        if reasoning:
            opening, text, closing = reasoning.groups()
            before, content = opening + slots.around(text, "thought") + closing, content[reasoning.end() :]
        pieces = self.template.sentinels.split(content)  # at odd places stands what is looked for
        if len(pieces) > 1 and not "".join(pieces[::2]).strip():
            pieces = [content]  # all of it happens to be text that the template has too
        for number in range(0, len(pieces), 2):
            pieces[number] = slots.around(pieces[number], "text")
        return before + "".join(pieces)

    def _call(self, call: dict[str, Any], slots: "_Slots") -> dict[str, Any]:
        function = call["function"]
        name = slots.around(function["name"], "call")
        data = {key: self._data(value, slots) for key, value in function.items() if key != "name"}
        return {**{key: self._data(value, slots) for key, value in call.items()}, "function": {"name": name, **data}}

    def _data(self, value: Any, slots: "_Slots") -> Any:
        """A value of JSON as it is, apart from text that spells a special token."""
        if isinstance(value, str):
            if "\ufdd0" in value:
                raise Problem("is given text with the code point U+FDD0, which is no character")
            return self.special.sub(lambda found: slots.around(found[0], "data"), value)
        if isinstance(value, dict):
            return {self._data(key, slots): self._data(item, slots) for key, item in value.items()}
        return [self._data(item, slots) for item in value] if isinstance(value, list) else value


class _Slots:
    """Numbers the slots of one message."""

    def __init__(self, slot_texts: dict[str, str], prefix: str):
        self.slot_texts, self.prefix, self.count = slot_texts, prefix, 0

    def around(self, text: str, kind: str) -> str:
        """The text with a slot in place of all but the white space at its edges."""
        core = text.strip()
        if not core:
            return text
        name = f"{self.prefix}{kind}{self.count}"
        self.count += 1
        self.slot_texts[name] = core
        return text.replace(core, SLOT.format(name), 1)


@dataclass(frozen=True)
class Turn:
    """What to train on in one assistant turn; `answer` is where it goes on after a thought, if there is one."""

    message: int | None  # None: a marked part of the text that belongs to no one message
    begin: Place
    end: Place
    answer: Place | None = None


@dataclass(frozen=True)
class MaskPlan:
    """The template's own text around the slots and, in it, what to train on.

    "U: [0.text0]\\nA: [1.text0]</s>"

    literals  ["U: ", "\\nA: ", "</s>"]    slots  ["0.text0", "1.text0"]    turns  [Turn(1, (1, 4), (2, 4))]

    `drops_reasoning`: the template leaves out a thought of the last turn.
    """

    literals: list[str]
    slots: list[str]
    turns: list[Turn]
    drops_reasoning: bool = False

    def fill(self, slot_texts: dict[str, str], escaper: SpecialTokenEscaper | None = None) -> tuple[str, list[int]]:
        """The text with the slots filled, and where in it each literal begins; special tokens under guard's names."""
        literals = [escaper.mark(literal) for literal in self.literals] if escaper else self.literals
        pieces = [literals[0]]
        for slot, literal in zip(self.slots, literals[1:], strict=True):
            pieces += slot_texts.get(slot, ""), literal
        return "".join(pieces), list(accumulate(map(len, pieces), initial=0))[:-1:2]

    def span(self, turn: Turn, begins: list[int], escaper: SpecialTokenEscaper | None = None) -> Span:
        """What to train on of a turn, in the filled text."""
        start, end = (
            begins[number] + offset + (escaper.marks_before(self.literals[number], offset) if escaper else 0)
            for number, offset in (turn.begin, turn.end)
        )
        return start, end


def make_mask_plan(template: Template, skeleton: Skeleton) -> MaskPlan:
    """What to train on, in terms of the template's own text.

    Raises Problem where that is not certain, NotShown where the template leaves out what was said.
    """
    text, marks = template.render(skeleton.messages, skeleton.tools)
    literals, slots = _split(text)
    hidden = _check_shown(template, skeleton, text, slots)
    if template.is_marked:
        turns = _marked_turns(template, marks, literals, slots)
    else:
        assistants = [index for index, message in enumerate(skeleton.messages) if message["role"] == "assistant"]
        turns = [_turn(template, skeleton, index, literals, slots) for index in assistants]
    return MaskPlan(literals, slots, turns, hidden)


def _check_shown(template: Template, skeleton: Skeleton, text: str, slots: list[str]) -> bool:
    """All that is said must stand somewhere, but for thoughts before the last turn, which templates drop.

    A thought within the content may be left out in the last turn too; True where it is.
    """
    last = max(index for index, message in enumerate(skeleton.messages) if message["role"] == "assistant")
    hidden = False
    for name in [name for name in skeleton.slot_texts if name not in slots]:
        prefix, _, kind = name.partition(".")
        if kind.startswith("data"):
            continue
        index = int(prefix)
        message = skeleton.messages[index]
        if kind.startswith("thought"):
            if template.reasoning_key in message and index == last:
                raise NotShown(f"messages[{index}].reasoning ({message['role']})")
            hidden = hidden or index == last
            continue
        what = "tool_calls" if kind.startswith("call") else "content"
        if what == "content" and _depends_on(template, skeleton, index, text):
            raise Problem(f"changes messages[{index}].content ({message['role']})")
        raise NotShown(f"messages[{index}].{what} ({message['role']})")
    if skeleton.tools and template.render(skeleton.messages, skeleton.tools[:-1])[0] == text:
        raise NotShown("all tools" if len(skeleton.tools) > 1 else "tools")
    for index, message in enumerate(skeleton.messages):
        emptied = _without_arguments(message)
        if emptied != message and _with(template, skeleton, index, emptied) == text:
            raise NotShown(f"the arguments of messages[{index}].tool_calls")
    return hidden


def _without_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [{**call, "function": {**call["function"], "arguments": {}}} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _depends_on(template: Template, skeleton: Skeleton, index: int, text: str) -> bool:
    """Whether the rendering is another one when this message says something else."""
    message = skeleton.messages[index]
    return _with(template, skeleton, index, {**message, "content": SLOT.format("other") + message["content"]}) != text


def _with(template: Template, skeleton: Skeleton, index: int, message: dict[str, Any]) -> str:
    """The rendering with another message at this place."""
    return template.render([*skeleton.messages[:index], message, *skeleton.messages[index + 1 :]], skeleton.tools)[0]


def _marked_turns(template: Template, marks: list[Span], literals: list[str], slots: list[str]) -> list[Turn]:
    """What is marked; marks around nothing that is said, such as a turn's end, belong to the turn before."""
    turns: list[Turn] = []
    for mark in marks:
        begin, end = (_place(position, literals, slots) for position in mark)
        inside = {slot.partition(".")[0] for slot in slots[begin[0] : end[0]]}
        message = int(inside.pop()) if len(inside) == 1 else turns[-1].message if turns and not inside else None
        turns.append(Turn(message, begin, end, _answer(template, message, literals, slots)))
    return turns


def _place(position: int, literals: list[str], slots: list[str]) -> Place:
    """Where in the template's own text a character of a rendering with slots stands."""
    at = 0
    for number, literal in enumerate(literals):
        if position <= at + len(literal):
            if position < at:
                break
            return number, position - at
        at += len(literal) + (len(SLOT.format(slots[number])) if number < len(slots) else 0)
    raise Problem("has {% generation %} marks inside of what is said")


def _turn(template: Template, skeleton: Skeleton, index: int, literals: list[str], slots: list[str]) -> Turn:
    first, last = _places(slots, index)
    prompt, before = _split(template.render(skeleton.messages[:index], skeleton.tools, prompt=True)[0])
    if before[-1:] != slots[:first][-1:]:
        raise Problem(f"does not show messages[{index}] (assistant) after its generation prompt")
    start = _shared(prompt[-1], literals[first])
    end = _end(template, skeleton, index, literals, slots, last)
    return Turn(index, (first, start), (last, end), _answer(template, index, literals, slots))


def _answer(template: Template, index: int | None, literals: list[str], slots: list[str]) -> Place | None:
    """Where the answer begins after the thought of a message: behind the tag or special token that closes it."""
    reasonings = [place for place, slot in enumerate(slots) if slot.startswith(f"{index}.thought")]
    if not reasonings:
        return None
    after = reasonings[-1] + 1
    literal = literals[after]
    closing = CLOSING_TAG.match(literal) or template.special.match(literal, _indent(literal))
    if closing:
        return after, closing.end()
    goes_on = slots[after : after + 1] and slots[after].startswith(f"{index}.text")
    return after, len(literal) if goes_on else 0


def _indent(text: str) -> int:
    """The length of the white space at its start."""
    return len(text) - len(text.lstrip())


def _end(template: Template, skeleton: Skeleton, index: int, literals: list[str], slots: list[str], last: int) -> int:
    """How much of what follows the content of messages[index] ends its turn.

    the conversation ends here    <|end|>\\n<|endoftext|>
    someone else goes on          <|end|>\\n<|user|>\\n         the last special token of both ends it
    """
    is_last = index + 1 == len(skeleton.messages)
    alone = literals[last] if is_last else _after(template, skeleton, index)
    ends = [match.end() for match in template.special.finditer(alone)]
    if not ends:
        raise ModelError(
            f"{template.name}: the chat template ends the assistant's turn with {alone!r}, which holds no "
            "special token, so that the model would never learn to stop; put eos_token there."
        )
    follows = literals[last]
    if is_last:
        try:
            follows = _after(template, skeleton, index, {"role": "user", "content": SLOT.format("another")})
        except Problem:
            return ends[-1]
    shared = len(commonprefix([alone, follows]))
    both = [end for end in ends if end <= shared]
    if both or is_last:
        return (both or ends)[-1]
    common, indent = _common_end(template, skeleton, literals, slots), _indent(follows)
    if common and follows.startswith(common, indent) and template.special.match(alone, _indent(alone)):
        return indent + len(common)
    raise Problem(f"ends messages[{index}] (assistant) with {alone!r} only when it is the last")


def _after(template: Template, skeleton: Skeleton, index: int, *another: dict[str, Any]) -> str:
    """The template's own text that follows messages[index] where it is the last, or where another follows it."""
    literals, slots = _split(template.render([*skeleton.messages[: index + 1], *another], skeleton.tools)[0])
    return literals[_places(slots, index)[1]]


def _common_end(template: Template, skeleton: Skeleton, literals: list[str], slots: list[str]) -> str:
    """The special token that ends every user's turn, for templates whose very last turn alone ends by another.

    <|start|>user<|message|>Hi<|end|><|start|>assistant<|message|>Yes<|return|>      <|end|>, since <|start|> begins
    """
    whole = "".join(literals).removeprefix(template.variables.get("bos_token") or "")
    begins = template.special.search(whole)
    says = [slot.partition(".")[0] for slot in slots]
    users = {str(index) for index, message in enumerate(skeleton.messages) if message["role"] == "user"}
    follow = [
        template.special.match(literals[place + 1], _indent(literals[place + 1]))
        for place, speaker in enumerate(says)
        if speaker in users and says[place + 1 : place + 2] != [speaker]
    ]
    tokens = {found[0] if found else "" for found in follow}
    return tokens.pop() if len(tokens) == 1 and begins and begins[0] not in tokens else ""


def _split(rendered: str) -> tuple[list[str], list[str]]:
    """The template's own text, and the slots between: "U: [0.text0]</s>" -> ["U: ", "</s>"], ["0.text0"]."""
    pieces = FIND_SLOT.split(rendered)
    return pieces[::2], pieces[1::2]


def _places(slots: list[str], index: int) -> tuple[int, int]:
    """The [first, last) of a message's slots; raises Problem if they are missing, repeated or apart.

    The names of called tools may come again, where the tools answer.
    """
    shown = [place for place, slot in enumerate(slots) if slot.startswith(f"{index}.")]
    if not shown:
        raise Problem(f"does not show messages[{index}] (assistant)")
    first = last = shown[0]
    while last in shown and slots[last] not in slots[first:last]:
        last += 1
    if any(not slots[place].startswith(f"{index}.call") for place in shown if place >= last):
        raise Problem(f"shows messages[{index}] (assistant) more than once or in pieces")
    return first, last


def _shared(prompt: str, rendered: str) -> int:
    """How much of the template's text before a content is its generation prompt, which the model is given.

    prompt                    rendered                                shared
    "<|assistant|>\\n"         "<|assistant|>\\n<think>\\n</think>\\n"    "<|assistant|>\\n"
    "<|assistant|><think>"    "<|assistant|></think>"                 "<|assistant|>"

    Raises Problem if they differ by more than white space or a thought that the prompt opens.
    """
    shared = len(commonprefix([prompt, rendered]))
    if shared in (len(prompt), len(rendered)):
        return shared
    tag = rendered.rfind("<", 0, shared)
    if tag >= 0 and ">" not in rendered[tag:shared]:
        shared = tag
    if not OPENED_THOUGHT.fullmatch(prompt[shared:]):
        raise Problem(f"leads to the assistant by {prompt[-80:]!r} or, in a whole chat, by {rendered[-80:]!r}")
    return shared
