"""Reads and writes texts of a configuration in which ${...} is OmegaConf's reference to another value.

This module uses only the standard library, so that --help works before the first installation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


def escape_references(text: str) -> str:
    r"""Return the text that OmegaConf reads back as `text`: ${x} is written \${x}, and \${x} is written \\\${x}."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def map_texts(change: Callable[[str], str], tree: Any) -> Any:
    """Return a tree of plain values in which `change` is applied to every text; keys stay."""
    if isinstance(tree, dict):
        return {key: map_texts(change, value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_texts(change, value) for value in tree]
    return change(tree) if isinstance(tree, str) else tree
