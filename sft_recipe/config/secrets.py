"""Keeps secrets of the environment, such as HF_TOKEN, out of what a run writes and logs."""

import os
import re
from typing import Any

from sft_recipe.config.references import map_texts

# A name that goes on (TOKENIZER_PATH), or says where a secret is (HF_TOKEN_PATH), is no secret's.
SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY)S?(?![A-Z])"
    r"(?!.*_(PATH|FILE|DIR|URL|NAME)$)",
    re.IGNORECASE,
)
MIN_SECRET_LENGTH = 8  # characters; shorter values (true, 0) would match everywhere


def without_secrets(tree: Any) -> Any:
    """Return a tree of plain values in which `${oc.env:NAME}` replaces the value of every secret variable NAME."""
    names = {
        value: name
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= MIN_SECRET_LENGTH
    }
    if not names:
        return tree
    # Longest first: of a secret that contains another nothing may be left over.
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    return map_texts(lambda text: pattern.sub(lambda match: f"${{oc.env:{names[match[0]]}}}", text), tree)
