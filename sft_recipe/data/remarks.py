"""Counts what users should know about records that are trained on: keys that are not read, unfinished reasoning."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sft_recipe.data.messages import CUT_TEXT, Conversation, Message
from sft_recipe.data.pretokenized import TokenizedRecord
from sft_recipe.language import plural

SHOWN = 3  # records that are named
SHOWN_KEYS = 20  # keys that a sentence names, the most frequent ones
MAX_KEYS = 100  # keys that are counted by name; the others together
REJECTED_ANSWER = "rejected"  # the key of preference data
OTHER_KEYS = "other keys"
TURN_NAMES = "the name of a turn"  # where the chat template does not show it
OPEN_REASONING = "a <think> that is never closed; the model is trained to leave it open"
ONLY_REASONING = "reasoning without an answer; the model is trained to end its turn after it"


@dataclass
class Finding:
    """A Finding has the number of records with some property, and the sources of the first ones."""

    count: int = 0
    sources: list[str] = field(default_factory=list)

    def add(self, count: int, sources: list[str]) -> None:
        """Add records that come after all others."""
        self.count += count
        self.sources += sources[: SHOWN - len(self.sources)]


@dataclass
class Remarks:
    """Remarks have the number of records by key that is not read, and the records whose reasoning is unfinished.

    `open_reasoning`: an assistant turn begins with <think> but has no </think>. `only_reasoning`: an assistant turn
    has reasoning, but neither text nor a call after it.
    """

    unread: dict[str, int] = field(default_factory=dict)
    open_reasoning: Finding = field(default_factory=Finding)
    only_reasoning: Finding = field(default_factory=Finding)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Remarks":
        """Return the remarks that `asdict` turned into these values. Raises TypeError or LookupError for others."""
        return cls(values["unread"], Finding(**values["open_reasoning"]), Finding(**values["only_reasoning"]))

    def add(self, record: Conversation | TokenizedRecord, omits_names: bool = False) -> None:
        """Count a record; with `omits_names` the chat template does not show the names of its turns."""
        for key in (*record.unread, *([TURN_NAMES] if omits_names else [])):
            self._add_unread(key, 1)
        trained = [message for message in record.messages if message.role == "assistant" and message.train]
        if any(map(_is_open, trained)):
            self.open_reasoning.add(1, [record.source])
        if any(map(_is_only_reasoning, trained)):
            self.only_reasoning.add(1, [record.source])

    def merge(self, other: "Remarks") -> None:
        """Add the counts of records that come after those counted so far."""
        for key, count in other.unread.items():
            self._add_unread(key, count)
        self.open_reasoning.add(other.open_reasoning.count, other.open_reasoning.sources)
        self.only_reasoning.add(other.only_reasoning.count, other.only_reasoning.sources)

    def _add_unread(self, key: str, count: int) -> None:
        key = key if key in self.unread or len(self.unread) < MAX_KEYS else OTHER_KEYS
        self.unread[key] = self.unread.get(key, 0) + count

    def sentences(self) -> Iterator[str]:
        """Yield a sentence without a final period for each kind of remark that there is."""
        unread = {key: count for key, count in self.unread.items() if key not in (REJECTED_ANSWER, CUT_TEXT)}
        if unread:
            counts = sorted(unread.items(), key=lambda item: -item[1])
            named = ", ".join(f"{key} ({plural(count, 'record')})" for key, count in counts[:SHOWN_KEYS])
            more = f" and {len(counts) - SHOWN_KEYS} more" if len(counts) > SHOWN_KEYS else ""
            yield f"keys that are not read: {named}{more}"
        if count := self.unread.get(REJECTED_ANSWER):
            yield f"{plural(count, 'record')} with a rejected answer, which is not used: the chosen one is trained on"
        if count := self.unread.get(CUT_TEXT):
            yield f"{plural(count, 'record')} with a text cut by data.max_chars; a cut answer is trained to end there"
        for finding, problem in ((self.open_reasoning, OPEN_REASONING), (self.only_reasoning, ONLY_REASONING)):
            if finding.count:
                more = "; ..." if finding.count > len(finding.sources) else ""
                yield f"{plural(finding.count, 'record')} with {problem}: {'; '.join(finding.sources)}{more}"


def _is_open(message: Message) -> bool:
    return message.content.lstrip().startswith("<think>") and "</think>" not in message.content


def _is_only_reasoning(message: Message) -> bool:
    has_reasoning = bool(message.reasoning) or "</think>" in message.content
    return has_reasoning and not message.tool_calls and not message.content.rpartition("</think>")[2].strip()
