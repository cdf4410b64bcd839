"""Turns tokens into text while they are generated, and splits the text into reasoning and answer."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Piece:
    """A Piece is a part of an answer, in the order of generation."""

    kind: Literal["reasoning", "answer"]
    text: str


class IncrementalDecoder:
    """Decodes tokens one at a time; the texts that it returns join to the decoding of all tokens.

    Special tokens have no text, except the tags of reasoning.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._decode = tokenizer.backend_tokenizer.decode
        self._hidden = {
            number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content not in (OPEN, CLOSE)
        }
        self._ids: list[int] = []
        self._context = self._read = 0  # text of ids[_context:_read] has been returned; it is the context of the next

    def put(self, token: int) -> str:
        """Return the text that this token adds, "" while a character is not complete."""
        if token in self._hidden:
            return ""
        self._ids.append(token)
        text = self._pending()
        if not text or text.endswith("\ufffd"):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return text

    def end(self) -> str:
        """Return the rest of the text: what the last tokens have of a character that is not complete."""
        text = self._pending()
        self._context = self._read = len(self._ids)
        return text

    def _pending(self) -> str:
        before = self._decode(self._ids[self._context : self._read], skip_special_tokens=False)
        return self._decode(self._ids[self._context :], skip_special_tokens=False)[len(before) :]


class StopStrings:
    """Lets text through up to the first of some stop strings; `found` says that there was one."""

    def __init__(self, strings: Collection[str]):
        self.found = False
        self._strings = strings
        self._pending = ""

    def feed(self, text: str) -> str:
        """Return what can be shown so far: not what may become a stop string."""
        if self.found:
            return ""
        self._pending += text
        starts = [start for string in self._strings if (start := self._pending.find(string)) >= 0]
        self.found = bool(starts)
        length = min(starts) if starts else len(self._pending) - _overlap(self._pending, self._strings)
        shown, self._pending = self._pending[:length], "" if starts else self._pending[length:]
        return shown

    def end(self) -> str:
        """Return the rest, which no stop string follows."""
        rest, self._pending = self._pending, ""
        return rest


class ReasoningSplitter:
    """Splits text into reasoning, between `<think>` and `</think>` at the start, and the answer after it.

    `inside` says that the prompt has opened the tag. White space at both ends of the reasoning and before the answer
    that follows it is left out.
    """

    def __init__(self, inside: bool = False):
        self._state: Literal["start", "reasoning", "answer"] = "reasoning" if inside else "start"
        self._pending = ""
        self._skips_space = inside

    def feed(self, text: str) -> Iterator[Piece]:
        """Yield what the text adds, except an end that may become a tag."""
        self._pending += text
        if self._state == "start":
            yield from self._open()
        if self._state == "reasoning":
            yield from self._reason()
        if self._state == "answer":
            yield from self._piece("answer", len(self._pending))

    def end(self) -> Iterator[Piece]:
        """Yield the rest."""
        kind: Literal["reasoning", "answer"] = "reasoning" if self._state == "reasoning" else "answer"
        yield from self._piece(kind, len(self._pending.rstrip() if kind == "reasoning" else self._pending))

    def _open(self) -> Iterator[Piece]:
        start = self._pending.lstrip()
        if start.startswith(OPEN):
            self._pending, self._state, self._skips_space = start.removeprefix(OPEN), "reasoning", True
        elif not OPEN.startswith(start):
            self._state = "answer"
        yield from ()

    def _reason(self) -> Iterator[Piece]:
        end = self._pending.find(CLOSE)
        if end < 0:
            shown = self._pending[: len(self._pending) - _overlap(self._pending, [CLOSE])]
            yield from self._piece("reasoning", len(shown.rstrip()))
            return
        yield from self._piece("reasoning", len(self._pending[:end].rstrip()))
        self._pending = self._pending.lstrip()[len(CLOSE) :]
        self._state, self._skips_space = "answer", True

    def _piece(self, kind: Literal["reasoning", "answer"], length: int) -> Iterator[Piece]:
        text, self._pending = self._pending[:length], self._pending[length:]
        if self._skips_space:
            text = text.lstrip()
        if text:
            self._skips_space = False
            yield Piece(kind, text)


def _overlap(text: str, strings: Collection[str]) -> int:
    """Return the length of the longest end of `text` with which one of the strings begins."""
    lengths = range(min(len(text), max(map(len, strings), default=1) - 1), 0, -1)
    return next((length for length in lengths if any(string.startswith(text[-length:]) for string in strings)), 0)
