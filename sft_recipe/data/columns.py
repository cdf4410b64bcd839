"""Renames the columns of records: data.columns says which column of the data holds which field of a format."""

from collections.abc import Mapping
from typing import Any

from sft_recipe.config.validation import nearest
from sft_recipe.data.turns import parse_json
from sft_recipe.errors import ConfigError, DataError

# Fields that data.columns may rename: those of records, and those of the turns in them.
COLUMNS = ["messages", "conversations", "prompt", "response", "completion", "query", "instruction", "input", "output"]
COLUMNS += ["chosen", "system", "tools", "history", "chat_template_kwargs"]
COLUMNS += ["role", "content", "from", "value", "reasoning_content", "tool_calls", "weight", "train"]
TURN_FIELDS = ("messages", "conversations", "prompt", "response", "completion", "query", "output", "chosen")


class Columns:
    """Columns maps fields of our formats to columns of the data (`{"response": "answer"}`).

    `unused` are the fields whose column no record has had so far. Raises ConfigError for a field not in COLUMNS.
    """

    def __init__(self, columns: Mapping[str, str] | None = None):
        self.columns = dict(columns or {})
        self.unused = set(self.columns)
        for field in self.columns:
            if field not in COLUMNS:
                raise ConfigError(f"data.columns names {field!r}, which no format has.{nearest(field, COLUMNS)}")

    def rename(self, record: Any, source: str) -> Any:
        """Return the record with the fields of our formats, also in its lists of turns.

        Raises DataError for JSON in a field that cannot be used.
        """
        if not self.columns or not isinstance(record, dict):
            return record
        renamed = dict(record)
        for field, column in self.columns.items():
            if column in record:
                self.unused.discard(field)
                renamed.pop(column, None)
                renamed[field] = record[column]
        for field in TURN_FIELDS:
            turns = parse_json(renamed.get(field), field, source)
            if isinstance(turns, list):
                renamed[field] = [self.rename(turn, source) for turn in turns]
        return renamed

    def check_all_found(self) -> None:
        """Raises DataError if data.columns names a column that no record had."""
        if self.unused:
            missing = ", ".join(f"{field}={self.columns[field]!r}" for field in sorted(self.unused))
            raise DataError(f"data.columns: {missing}, but no record has such a column; check the names in the data.")
