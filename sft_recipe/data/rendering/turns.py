"""Locates, in a rendered skeleton, what the model must produce itself in each assistant turn."""

import re
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from sft_recipe.data.rendering.chat_template import ChatTemplate, Refused, Span, TemplateError
from sft_recipe.data.rendering.skeleton import SLOT, Skeleton, split_at_slots
from sft_recipe.errors import ModelError

# With the line ends after it, but not the space before an answer: " Paris" is a token, which the model produces.
CLOSING_TAG = re.compile(r"\s*</\w+>(\s*[\r\n])?")
# What a generation prompt may have after the header: a tag that opens reasoning, or reasoning that is closed at once:
# <think></think>, <|START_THINKING|><|END_THINKING|>, <|channel>thought\n<channel|>.
OPENING = r"<[^<>\s]*think[^<>\s]*>|<[^<>\s]+>\s*(thought|thinking)\b"
CLOSING = r"\s*(<[^<>\s]+>\s*)?"
OPENED_REASONING = re.compile(rf"\s*((<\w+>|{OPENING}){CLOSING})?", re.IGNORECASE)
CLOSED_REASONING = re.compile(rf"({OPENING}){CLOSING}", re.IGNORECASE)
# A user turn that the conversation does not have.
USER_SLOT = "other"
USER = {"role": "user", "content": SLOT.format(USER_SLOT)}

Position = tuple[int, int]  # the index of a literal, and an offset in it in characters


@dataclass(frozen=True)
class Turn:
    """Says what to train on in one assistant turn, [start, end).

    `message` is the index of the message, None for a {% generation %} block that covers several messages.
    `answer_start` is where the answer begins after the turn's reasoning, None for a turn without reasoning. `problem`
    says why the turn cannot be trained on; then start and end are equal.
    """

    message: int | None
    start: Position
    end: Position
    answer_start: Position | None = None
    problem: str = ""


class NoStopToken(TemplateError):
    """Says that a turn ends without a token at which generation stops, so that it can be context only."""


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
        first, last = _slot_range(self.slots, index, self._repeated_names(index))
        start = first, self._start(index, first)
        try:
            end = last, self._end(index, last)
        except NoStopToken as error:
            return Turn(index, start, start, problem=str(error))
        return Turn(index, start, end, self._answer_start(index))

    def _start(self, index: int, first: int) -> int:
        """How many characters of the literal before the content of messages[index] come from elsewhere.

        That is what the rendering shares with the generation prompt of the turns before. Many templates have no such
        prompt except after a user turn, or cannot render these turns alone. Then a user turn is inserted after them.
        """
        before = self.skeleton.messages[:index]
        literal = self.literals[first]
        role_before = before[-1]["role"] if before else ""
        if role_before in ("user", "tool"):
            try:
                return self._start_after_prompt(index, first)
            except TemplateError as error:
                problem = error
        else:
            problem = TemplateError(f"has no generation prompt for messages[{index}] (assistant)")
        start = self._start_after_user(index, literal)
        if start is not None:
            return start
        has_prompt = bool(before) and self._has_prompt(before)
        header = literal.removeprefix(self._bos if index == 0 else "")
        if not header.strip() and not (has_prompt and role_before == "user"):
            return len(literal)
        if has_prompt:
            return self._start_after_prompt(index, first)
        raise problem

    def _has_prompt(self, turns: list[dict[str, Any]]) -> bool:
        try:
            return self._render(turns) != self._render(turns, prompt=True)
        except Refused:
            return False

    def _start_after_prompt(self, index: int, first: int) -> int:
        try:
            prompt, slots = self._render(self.skeleton.messages[:index], prompt=True)
        except Refused as error:
            raise TemplateError(f"cannot render the turns before messages[{index}] alone: {error.reason}") from error
        if slots[-1:] != self.slots[:first][-1:]:
            raise TemplateError(f"does not render messages[{index}] (assistant) after its generation prompt")
        continues = index > 0 and self.skeleton.messages[index - 1]["role"] in ("assistant", "tool")
        return _shared_with_prompt(prompt[-1], self.literals[first], continues)

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
        return after, len(literal.rstrip(" ")) if text_follows else 0

    def _end(self, index: int, last: int) -> int:
        """How many characters of the literal after the content of messages[index] belong to its turn.

        the conversation ends     <|end|>\n<|endoftext|>
        another turn follows      <|end|>\n<|user|>\n         the last special token in both ends the turn

        An eos token in both ends it before that: generation stops there, whatever the template renders next.
        """
        is_last = index + 1 == len(self.skeleton.messages)
        at_end = self.literals[last] if is_last else self._literal_at_end(index)
        at_end = self._without_prompt(index, at_end)
        ends = self._special_ends(at_end)
        if not ends:
            return self._end_at_marker(index, last, at_end)
        before_next = self.literals[last]
        if is_last:
            try:
                before_next = self._literal_after(index, self.skeleton.messages[:index], USER)
            except TemplateError:
                before_next = at_end
        shared = len(commonprefix([at_end, before_next]))
        shared_ends = [end for end in ends if end <= shared]
        if shared_ends:
            eos = self.template.variables.get("eos_token") or ""
            ends_with_eos = [end for end in shared_ends if eos and at_end.endswith(eos, 0, end)]
            return (ends_with_eos or shared_ends)[-1]
        return ends[-1] if is_last else self._end_as_of_users(index, at_end, before_next)

    def _end_at_marker(self, index: int, last: int, at_end: str) -> int:
        """How many characters belong to a turn that the marker of the next role ends, or that nothing ends.

        another turn follows      <|user|>\n      the marker ends the turn
        the conversation ends                     the marker, or eos where it is text, is appended (see `appended`)
        """
        stops = self._stops(index, at_end)
        if not stops:
            raise ModelError(
                f"{self.template.name}: the chat template ends the assistant's turn with {at_end!r}, which contains no "
                "special token, so the model would never learn to stop; add eos_token at the end of that turn."
            )
        if index + 1 < len(self.skeleton.messages):
            end = next((len(stop) for stop in stops if self.literals[last].startswith(stop)), 0)
            if not end:
                raise NoStopToken(
                    f"has no token after messages[{index}] (assistant) at which generation stops; "
                    "data.split_turns=true makes an example of each turn, which ends with one"
                )
            return end
        return len(stops[0]) if self.template.appends_stop_token else len(at_end.rstrip())

    def _stops(self, index: int, at_end: str) -> list[str]:
        """The literals after messages[index] through a token at which generation stops, [] if there is none.

        That is the marker of the next role, after calls that of a tool's result first; else eos. White space that the
        template, not the data, puts before it may belong to the turn or not: then there is none.
        """
        content, calls = self.skeleton.messages[index]["content"], self.skeleton.messages[index].get("tool_calls", [])
        of_template = at_end.removeprefix(content[len(content.rstrip()) :])
        if of_template != of_template.rstrip():
            return []
        identifier = {"tool_call_id": calls[0]["id"]} if calls and "id" in calls[0] else {}
        results = [{**USER, "role": "tool", **identifier}] if calls else []
        stops, is_certain = [], True
        for following in (*results, USER):
            try:
                literal = self._literal_after(index, self.skeleton.messages[:index], following)
            except TemplateError:
                continue
            rest = literal.removeprefix(at_end) if literal.startswith(at_end) else ""
            marker = self.template.special_pattern.match(rest, _indent(rest))
            if marker and marker[0] != self._bos:
                is_certain = is_certain and not marker.start()
                stops.append(at_end + rest[: marker.end()])
        if stops:
            return stops if is_certain else []
        eos = self.template.variables.get("eos_token") or ""
        return [at_end + eos] if self.template.special_pattern.fullmatch(eos) else []

    def appended(self, turns: list[Turn]) -> str:
        """Return the text that must be appended to the conversation, so that its last turn ends, "" for most."""
        literal = self.literals[-1]
        if not turns or turns[-1].message is None or turns[-1].end <= (len(self.literals) - 1, len(literal)):
            return ""
        return self._stops(turns[-1].message, literal)[0][len(literal) :]

    def _end_as_of_users(self, index: int, at_end: str, before_next: str) -> int:
        """The end of a turn that ends with another token than the last turn, if it is that of the users' turns."""
        shared = len(commonprefix([at_end, before_next]))
        other = next(match.start() for match in self.template.special_pattern.finditer(at_end) if match.end() > shared)
        token, indent = self._user_end_token(), other + _indent(before_next[other:])
        if token and other <= shared and before_next.startswith(token, indent):
            return indent + len(token)
        raise TemplateError(f"ends messages[{index}] (assistant) with {at_end!r} only when it is the last turn")

    def _special_ends(self, literal: str) -> list[int]:
        return [match.end() for match in self.template.special_pattern.finditer(literal)]

    def _without_prompt(self, index: int, at_end: str) -> str:
        """The literal at the end of a conversation, without the generation prompt that some templates always add.

        <|im_end|>\n<|im_start|>assistant\n   ->   <|im_end|>\n     a token that begins turns does not end them
        """
        begin = at_end.find(self._first_token) if self._first_token else -1
        if begin < 0 or not self._special_ends(at_end[:begin]):
            return at_end
        return at_end[:begin] if self._at_end(index) == self._at_end(index, prompt=True) else at_end

    @property
    def _first_token(self) -> str:
        """The first special token of the conversation after bos, which begins a turn in most templates."""
        match = self.template.special_pattern.search("".join(self.literals).removeprefix(self._bos))
        return match[0] if match else ""

    @property
    def _bos(self) -> str:
        return self.template.variables.get("bos_token") or ""

    def _repeated_names(self, index: int) -> int:
        """How often the names of the tools that messages[index] calls occur once more, where the tools answer."""
        own = [slot for slot in self.slots if slot.startswith(f"{index}.call")]
        if len(own) == len(set(own)):
            return 0
        _, slots = self._at_end(index)
        return len(own) - len([slot for slot in slots if slot.startswith(f"{index}.call")])

    def _literal_at_end(self, index: int) -> str:
        """The literal after messages[index] when it is the last message."""
        literals, slots = self._at_end(index)
        return literals[_slot_range(slots, index)[1]]

    def _at_end(self, index: int, *, prompt: bool = False) -> tuple[list[str], list[str]]:
        """The turns up to messages[index], rendered."""
        *before, message = self.skeleton.messages[: index + 1]
        try:
            return self._render([*before, message], prompt=prompt)
        except Refused:  # some templates need a user turn
            return self._render([*before, USER, message], prompt=prompt)

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
        messages = [slot.partition(".")[0] for slot in self.slots]
        users = {str(index) for index, message in enumerate(self.skeleton.messages) if message["role"] == "user"}
        after_users = [
            self.literals[number + 1]
            for number, message in enumerate(messages)
            if message in users and messages[number + 1 : number + 2] != [message]
        ]
        matches = [pattern.match(literal, _indent(literal)) for literal in after_users]
        tokens = {match[0] if match else "" for match in matches}
        if len(tokens) != 1 or self._first_token in tokens or not self._ends_users(*tokens):
            return ""
        return tokens.pop()

    def _ends_users(self, token: str) -> bool:
        """Return whether a user turn ends with this token where nothing follows, so that it begins no other turn."""
        first = next(index for index, message in enumerate(self.skeleton.messages) if message["role"] == "user")
        try:
            literals, _ = self._render(self.skeleton.messages[: first + 1])
        except Refused:
            return False
        return token in literals[-1]


def _indent(text: str) -> int:
    """The length of the white space at the start."""
    return len(text) - len(text.lstrip())


def _slot_range(slots: list[str], index: int, repeated_names: int = 0) -> tuple[int, int]:
    """The range [first, last) of the slots of a message; raises TemplateError if they are missing or not contiguous.

    Its last `repeated_names` slots are names of called tools outside the message, where the tools answer.
    """
    numbers = [number for number, slot in enumerate(slots) if slot.startswith(f"{index}.")]
    if not numbers:
        raise TemplateError(f"does not render messages[{index}] (assistant)")
    first, last = numbers[0], numbers[0] + len(numbers) - repeated_names
    texts = [slots[number] for number in numbers if not slots[number].startswith(f"{index}.call")]
    in_place = numbers[: last - first] == list(range(first, last)) and set(texts) <= set(slots[first:last])
    if not in_place or len(texts) > len(set(texts)):
        raise TemplateError(f"renders messages[{index}] (assistant) more than once or in pieces")
    return first, last


def _shared_with_prompt(prompt: str, literal: str, continues: bool = False) -> int:
    """How many characters of the literal before an assistant's content are the generation prompt, not model output.

    prompt                    literal                                 shared
    "<|assistant|>\\n"         "<|assistant|>\\n<think>\\n</think>\\n"    "<|assistant|>\\n"
    "<|assistant|><think>"    "<|assistant|></think>"                 "<|assistant|>"

    Raises TemplateError if they differ by more than white space or a reasoning tag that the prompt opens. A message
    that continues the assistant's turn may lack the header of the prompt.
    """
    shared = len(commonprefix([prompt, literal]))
    if shared == len(prompt) or (continues and shared == len(literal)):
        return shared
    tag = literal.rfind("<", 0, shared)
    if tag >= 0 and ">" not in literal[tag:shared]:
        shared = tag
    is_closed = shared == len(literal) and CLOSED_REASONING.fullmatch(prompt, max(literal.rfind("<"), 0))
    if not is_closed and not OPENED_REASONING.fullmatch(prompt[shared:]):
        raise TemplateError(
            f"has the generation prompt {prompt[-80:]!r}, but begins the assistant's turn in a complete conversation "
            f"with {literal[-80:]!r}"
        )
    return shared
