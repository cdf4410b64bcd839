"""Reads lists of prompts from files."""

import json
from pathlib import Path

from sft_recipe.errors import DataError
from sft_recipe.files import user_path


def read_prompts(name: str | Path) -> list[str]:
    """Return the prompts of a file: the lines of a text file, or the texts of a JSON list (.json).

    Empty lines are left out. Raises DataError for a file that cannot be read, and for one without prompts.
    """
    path = user_path(name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"the prompts {path} cannot be read: {reason}") from None
    prompts = _from_json(path, text) if path.suffix == ".json" else [line.strip() for line in text.splitlines()]
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise DataError(f"{path} has no prompts: write one on each line, or a JSON list of texts")
    return prompts


def _from_json(path: Path, text: str) -> list[str]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, list) or not all(isinstance(prompt, str) for prompt in content):
        raise DataError(f'{path}: expected a JSON list of texts, as in ["Name a fruit.", "What is AI?"]')
    return content
