"""Keeps secrets of the environment, such as HF_TOKEN, out of what a run writes and logs."""

import os
import re
from typing import Any

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
MIN_SECRET_LENGTH = 8  # characters; shorter values (true, 0) would match everywhere


def without_secrets(tree: Any) -> Any:
    """Return a tree of plain values in which `${oc.env:NAME}` replaces the value of every secret variable NAME."""
    if isinstance(tree, dict):
        return {key: without_secrets(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_secrets(value) for value in tree]
    if isinstance(tree, str):
        for name, value in os.environ.items():
            if SECRET_NAME.search(name) and len(value) >= MIN_SECRET_LENGTH:
                tree = tree.replace(value, f"${{oc.env:{name}}}")
    return tree
