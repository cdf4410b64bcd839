"""Locates, in a rendered skeleton, what the model must produce itself in each assistant turn."""

import re
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from sft_recipe.data.rendering.chat_template import ChatTemplate, Refused, Span, TemplateError
from sft_recipe.data.rendering.skeleton import SLOT, Skeleton, split_at_slots
from sft_recipe.errors import ModelError

CLOSING_TAG = re.compile(r"\s*</\w+>\s*")
# What a generation prompt may have after the header: a tag that opens reasoning, or reasoning that is closed at once:
# <think></think>, <|START_THINKING|><|END_THINKING|>, <|channel>thought\n<channel|>.
OPENED_REASONING = re.compile(
    r"\s*((<\w+>|<[^<>\s]*think[^<>\s]*>|<[^<>\s]+>\s*(thought|thinking)\b)\s*(<[^<>\s]+>\s*)?)?", re.IGNORECASE
)
# A user turn that the conversation does not have.
USER_SLOT = "other"
USER = {"role": "user", "content": SLOT.format(USER_SLOT)}

Position = tuple[int, int]  # the index of a literal, and an offset in it in characters


@dataclass(frozen=True)
class Turn:
    """Says what to train on in one assistant turn, [start, end).

    `message` is the index of the message, None for a {% generation %} block that covers several messages.
    `answer_start` is where the answer begins after the turn's reasoning, None for a turn without reasoning.
    """

    message: int | None
    start: Position
    end: Position
    answer_start: Position | None = None


@dataclass(frozen=True)
class TurnLocator:
    """Locates turns in a rendered skeleton, given as the template's literals and the slots between them."""

    template: ChatTemplate
    skeleton: Skeleton
    literals: list[str]
    slots: list[str]

    def assistant_turns(self) -> list[Turn]:
        """Return the turn of each assistant message.

        Raises TemplateError if a turn cannot be located with certainty, ModelError if it ends without a special token.
        """
        messages = self.skeleton.messages
        return [self._turn(index) for index, message in enumerate(messages) if message["role"] == "assistant"]

    def tagged_turns(self, generation_spans: list[Span]) -> list[Turn]:
        """Return the turns inside {% generation %} tags; a block without slots, such as a turn's end, continues a turn.

        Raises TemplateError if a tag is inside the text of a message.
        """
        turns: list[Turn] = []
        for span in generation_spans:
            start, end = (self._position(offset) for offset in span)
            messages = {slot.partition(".")[0] for slot in self.slots[start[0] : end[0]]}
            if messages:
                message = int(messages.pop()) if len(messages) == 1 else None
            else:
                message = turns[-1].message if turns else None
            turns.append(Turn(message, start, end, self._answer_start(message)))
        return turns

    def _position(self, offset: int) -> Position:
        """The position of a character of the rendered skeleton."""
        literal_start = 0
        for index, literal in enumerate(self.literals):
            if offset <= literal_start + len(literal):
                if offset < literal_start:
                    break
                return index, offset - literal_start
            slot = SLOT.format(self.slots[index]) if index < len(self.slots) else ""
            literal_start += len(literal) + len(slot)
        raise TemplateError("has {% generation %} tags inside the text of a message")

    def _turn(self, index: int) -> Turn:
        first, last = _slot_range(self.slots, index)
        start, end = self._start(index, first), self._end(index, last)
        return Turn(index, (first, start), (last, end), self._answer_start(index))

    def _start(self, index: int, first: int) -> int:
        """How many characters of the literal before the content of messages[index] come from elsewhere.

        That is what the rendering shares with the generation prompt of the turns before. A template may have no such
        prompt, since it cannot render these turns alone: before a greeting there is none, and some need a user turn.
        """
        if index:
            try:
                return self._start_after_prompt(index, first)
            except TemplateError as error:
                problem = error
        else:
            problem = TemplateError("has no generation prompt for a conversation that the assistant begins")
        start = self._start_after_user(index, self.literals[first])
        if start is None:
            raise problem
        return start

    def _start_after_prompt(self, index: int, first: int) -> int:
        try:
            prompt, slots = self._render(self.skeleton.messages[:index], prompt=True)
        except Refused as error:
            raise TemplateError(f"cannot render the turns before messages[{index}] alone: {error.reason}") from error
        if slots[-1:] != self.slots[:first][-1:]:
            raise TemplateError(f"does not render messages[{index}] (assistant) after its generation prompt")
        return _shared_with_prompt(prompt[-1], self.literals[first])

    def _start_after_user(self, index: int, literal: str) -> int | None:
        """The start, from the header of the same turn with a user turn inserted before it; None if it has another one.

        user turn inserted     "<|im_end|>\n<|im_start|>assistant\n<think>\n"   after the prompt: "<think>\n"
        the turn itself                    "<|im_start|>assistant\n<think>\n"   has the same header
        """
        before = [*self.skeleton.messages[:index], USER]
        try:
            (*_, prompt), slots = self._render(before, prompt=True)
            (*_, without), _ = self._render(before)
            literals, slots_after = self._render([*before, *self.skeleton.messages[index:]])
            first = _slot_range(slots_after, index)[0]
            if not slots[-1:] == slots_after[:first][-1:] == [USER_SLOT]:
                return None
            shared = _shared_with_prompt(prompt, literals[first])
        except TemplateError:
            return None
        header = len(commonprefix([prompt, without]))
        produced = len(literals[first]) - shared
        return len(literal) - produced if literal.endswith(literals[first][min(header, shared) :]) else None

    def _answer_start(self, index: int | None) -> Position | None:
        """Where the answer begins: after the tag or special token that closes the reasoning of messages[index]."""
        reasoning = [number for number, slot in enumerate(self.slots) if slot.startswith(f"{index}.think")]
        if not reasoning:
            return None
        after = reasoning[-1] + 1
        literal = self.literals[after]
        closing = CLOSING_TAG.match(literal) or self.template.special_pattern.match(literal, _indent(literal))
        if closing:
            return after, closing.end()
        text_follows = after < len(self.slots) and self.slots[after].startswith(f"{index}.text")
        return after, len(literal) if text_follows else 0

    def _end(self, index: int, last: int) -> int:
        """How many characters of the literal after the content of messages[index] belong to its turn.

        the conversation ends     <|end|>\n<|endoftext|>
        another turn follows      <|end|>\n<|user|>\n         the last special token in both ends the turn
        """
        is_last = index + 1 == len(self.skeleton.messages)
        at_end = self.literals[last] if is_last else self._literal_at_end(index)
        matches = list(self.template.special_pattern.finditer(at_end))
        if not matches:
            raise ModelError(
                f"{self.template.name}: the chat template ends the assistant's turn with {at_end!r}, which contains no "
                "special token, so the model would never learn to stop; add eos_token at the end of that turn."
            )
        before_next = self.literals[last]
        if is_last:
            try:
                before_next = self._literal_after(index, self.skeleton.messages[:index], USER)
            except TemplateError:
                return matches[-1].end()
        shared = len(commonprefix([at_end, before_next]))
        shared_ends = [match.end() for match in matches if match.end() <= shared]
        if shared_ends or is_last:
            return shared_ends[-1] if shared_ends else matches[-1].end()
        other = next(match.start() for match in matches if match.end() > shared)
        token, indent = self._user_end_token(), other + _indent(before_next[other:])
        if token and other <= shared and before_next.startswith(token, indent):
            return indent + len(token)
        raise TemplateError(f"ends messages[{index}] (assistant) with {at_end!r} only when it is the last turn")

    def _literal_at_end(self, index: int) -> str:
        """The literal after messages[index] when it is the last message."""
        before = self.skeleton.messages[:index]
        try:
            return self._literal_after(index, before)
        except Refused:  # some templates need a user turn
            return self._literal_after(index, [*before, USER])

    def _literal_after(self, index: int, before: list[dict[str, Any]], *following: dict[str, Any]) -> str:
        """The literal after messages[index] between these turns."""
        literals, slots = self._render([*before, self.skeleton.messages[index], *following])
        return literals[_slot_range(slots, index)[1]]

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> tuple[list[str], list[str]]:
        """Other messages, rendered: the literals and the slots between them."""
        return split_at_slots(self.template.render(messages, self.skeleton.tools, prompt=prompt)[0])

    def _user_end_token(self) -> str:
        """The special token that ends all user turns, "" if there is none.

        Needed for templates that end the last turn of a conversation with another token than all other turns:
        <|start|>user<|message|>Hi<|end|><|start|>assistant<|message|>Yes<|return|>   ->   "<|end|>"
        A token that begins the turns, here <|start|>, does not end them.
        """
        pattern = self.template.special_pattern
        first_token = pattern.search(
            "".join(self.literals).removeprefix(self.template.variables.get("bos_token") or "")
        )
        messages = [slot.partition(".")[0] for slot in self.slots]
        users = {str(index) for index, message in enumerate(self.skeleton.messages) if message["role"] == "user"}
        after_users = [
            self.literals[number + 1]
            for number, message in enumerate(messages)
            if message in users and messages[number + 1 : number + 2] != [message]
        ]
        matches = [pattern.match(literal, _indent(literal)) for literal in after_users]
        tokens = {match[0] if match else "" for match in matches}
        return tokens.pop() if len(tokens) == 1 and first_token and first_token[0] not in tokens else ""


def _indent(text: str) -> int:
    """The length of the white space at the start."""
    return len(text) - len(text.lstrip())


def _slot_range(slots: list[str], index: int) -> tuple[int, int]:
    """The range [first, last) of the slots of a message; raises TemplateError if they are missing or not contiguous.

    The names of called tools may occur again, where the tools answer.
    """
    numbers = [number for number, slot in enumerate(slots) if slot.startswith(f"{index}.")]
    if not numbers:
        raise TemplateError(f"does not render messages[{index}] (assistant)")
    first = last = numbers[0]
    while last in numbers and slots[last] not in slots[first:last]:
        last += 1
    if any(not slots[number].startswith(f"{index}.call") for number in numbers if number >= last):
        raise TemplateError(f"renders messages[{index}] (assistant) more than once or in pieces")
    return first, last


def _shared_with_prompt(prompt: str, literal: str) -> int:
    """How many characters of the literal before an assistant's content are the generation prompt, not model output.

    prompt                    literal                                 shared
    "<|assistant|>\\n"         "<|assistant|>\\n<think>\\n</think>\\n"    "<|assistant|>\\n"
    "<|assistant|><think>"    "<|assistant|></think>"                 "<|assistant|>"

    Raises TemplateError if they differ by more than white space or a reasoning tag that the prompt opens.
    """
    shared = len(commonprefix([prompt, literal]))
    if shared in (len(prompt), len(literal)):
        return shared
    tag = literal.rfind("<", 0, shared)
    if tag >= 0 and ">" not in literal[tag:shared]:
        shared = tag
    if not OPENED_REASONING.fullmatch(prompt[shared:]):
        raise TemplateError(
            f"has the generation prompt {prompt[-80:]!r}, but begins the assistant's turn in a complete conversation "
            f"with {literal[-80:]!r}"
        )
    return shared
