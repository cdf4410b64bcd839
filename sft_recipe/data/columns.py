"""Renames columns and roles of records.

data.columns says which column of the data holds which field of a format, data.roles what the data calls the roles.
"""

from collections.abc import Mapping
from typing import Any

from sft_recipe.config.validation import nearest
from sft_recipe.data.turns import parse_json
from sft_recipe.errors import ConfigError, DataError

# Fields that data.columns may rename: those of records, and those of the turns in them.
COLUMNS = ["messages", "conversations", "prompt", "response", "completion", "query", "instruction", "input", "output"]
COLUMNS += ["chosen", "system", "tools", "history", "chat_template_kwargs"]
COLUMNS += ["input_ids", "labels", "loss_mask"]
COLUMNS += ["role", "content", "from", "value", "reasoning_content", "tool_calls", "weight", "train"]
TURN_LISTS = ("messages", "conversations")
TURN_FIELDS = (*TURN_LISTS, "prompt", "response", "completion", "query", "output", "chosen")


class Columns:
    """Columns maps fields of our formats to columns of the data (`{"response": "answer"}`), and names of roles in the
    data to those of our formats (`{"Human": "user"}`).

    `unused` are the fields whose column no record has had so far. Raises ConfigError for a field not in COLUMNS.
    """

    def __init__(self, columns: Mapping[str, str] | None = None, roles: Mapping[str, str] | None = None):
        self.columns, self.roles = dict(columns or {}), dict(roles or {})
        self.unused = set(self.columns)
        for field in self.columns:
            if field not in COLUMNS:
                raise ConfigError(f"data.columns names {field!r}, which no format has.{nearest(field, COLUMNS)}")

    def rename(self, record: Any, source: str) -> Any:
        """Return the record with the fields and roles of our formats, also in its lists of turns.

        Raises DataError for JSON in a field that cannot be used.
        """
        if not (self.columns or self.roles) or not isinstance(record, dict):
            return record
        renamed = self._renamed(record)
        for field in TURN_FIELDS:
            turns = renamed.get(field)
            if field in TURN_LISTS:  # JSON in the others is text
                turns = parse_json(turns, field, source)
            if isinstance(turns, list):
                renamed[field] = [self._renamed_turn(turn) for turn in turns]
            elif isinstance(turns, dict):
                renamed[field] = self._renamed_turn(turns)
        return renamed

    def _renamed(self, record: dict[str, Any]) -> dict[str, Any]:
        renamed = dict(record)
        for field, column in self.columns.items():
            if column in record:
                self.unused.discard(field)
                renamed.pop(column, None)
                renamed[field] = record[column]
        return renamed

    def _renamed_turn(self, turn: Any) -> Any:
        if not isinstance(turn, dict):
            return turn
        renamed = self._renamed(turn)
        for key in ("role", "from"):
            if isinstance(name := renamed.get(key), str) and name in self.roles:
                renamed[key] = self.roles[name]
        return renamed

    def check_all_found(self) -> None:
        """Raises DataError if data.columns names a column that no record had."""
        if self.unused:
            missing = ", ".join(f"{field}={self.columns[field]!r}" for field in sorted(self.unused))
            raise DataError(f"data.columns: {missing}, but no record has such a column; check the names in the data.")
