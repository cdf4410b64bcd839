"""The text of an override as Hydra's grammar reads it."""

import re

QUOTED = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""


def quote_texts(override: str) -> str:
    """Return the override with quotes around texts that are not ASCII, which Hydra's grammar has in quotes only.

    `eval.prompts=[你好, Hi]` becomes `eval.prompts=["你好", Hi]`, and `data.train_files=数据.jsonl` likewise.
    """
    name, sign, value = override.partition("=")
    separators = r",:={}\[\]()" if value[:1] in ("[", "{") else ","
    return name + sign + re.sub(rf"{QUOTED}|[^{separators}'\"]+", _quote, value)


def _quote(found: re.Match[str]) -> str:
    text = found[0].strip()
    return found[0] if text.isascii() or text[0] in "'\"" else found[0].replace(text, f'"{text}"')
