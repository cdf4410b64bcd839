"""Names data sets and their columns in our terms, for the configurations of other projects."""

import re
from typing import Any, TypeGuard

from sft_recipe.config.importing.imported import Imported

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
SHAREGPT = {"role": "from", "content": "value"}


def hub_name(name: str, config: Any = None, split: Any = None) -> str:
    """Return a data set of the hub as data.train_files names it: `owner/name:config:split`."""
    if config and config != "default":
        return f"{name}:{config}:{split or 'train'}"
    return f"{name}:{split}" if split and split != "train" else name


def is_name(value: Any) -> TypeGuard[str]:
    """Return whether a value can name a file or a data set: a text that is not empty."""
    return isinstance(value, str) and bool(value.strip())


class Files:
    """Collects the files of a configuration, and the columns and roles of all of them, which must not contradict."""

    def __init__(self, imported: Imported):
        self.imported = imported
        self.names: list[str] = []
        self.columns: dict[str, str] = {}
        self.roles: dict[str, str] = {}

    def add(self, name: str, columns: dict[str, str], roles: dict[str, str] | None = None) -> None:
        """Add a file or a data set of the hub; `columns` are {our field: its column}, equal names left out."""
        self.names.append(name)
        for ours, theirs in columns.items():
            if ours != theirs and self.columns.setdefault(ours, theirs) != theirs:
                reason = f"data.columns is for all files, and {ours} is {self.columns[ours]} in another"
                self.imported.skip(f"columns of {name}", {ours: theirs}, reason)
        self.roles |= roles or {}

    def write(self, key: str, origin: str) -> None:
        """Set data.train_files or data.val_files, and what the files need."""
        if self.names:
            self.imported.set(key, self.names[0] if len(self.names) == 1 else self.names, origin)
        for ours, values in (("data.columns", self.columns), ("data.roles", self.roles)):
            if values:
                self.imported.set(ours, values, origin)
