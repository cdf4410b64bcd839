"""Selects the conversations that a preview shows."""

from collections.abc import Callable
from dataclasses import dataclass

from sft_recipe.data.messages import Conversation
from sft_recipe.data.pretokenized import TokenizedRecord

SORTS = ("longest", "shortest", "least_supervised")


@dataclass(frozen=True)
class Selection:
    """Says which conversations are shown: those that contain the text `find`, in capitals or not; at random or, with
    `sort`, the longest, the shortest or those with the fewest supervised tokens, in this order. `decode` gives the text
    of token ids, for records of the format `tokens`.
    """

    find: str = ""
    sort: str = ""
    decode: Callable[[list[int]], str] | None = None

    def finds(self, record: Conversation | TokenizedRecord) -> bool:
        """Return whether a record contains the text; without one, every record does."""
        text = self.find.casefold()
        if not text:
            return True
        if isinstance(record, TokenizedRecord):
            return self.decode is not None and text in self.decode(record.input_ids).casefold()
        return any(text in f"{m.content}\n{m.reasoning}".casefold() for m in record.messages)

    def key(self, tokens: int, supervised: int) -> int:
        """Return the key of an example to sort by: the highest are shown first."""
        return {"longest": tokens, "shortest": -tokens, "least_supervised": -supervised}[self.sort]
