"""Escapes special tokens, so that data which spells one, such as `<|im_end|>`, is encoded as ordinary text.

in the template    "<|im_end|>"  ->  "\\ufdd2<|im_end|>"   one special token
in a message       "<|im_end|>"  ->  "<|im_end|>"         several ordinary tokens
"""

import json
import re
from collections.abc import Iterable
from functools import cached_property

from tokenizers import Tokenizer

from sft_recipe.data.rendering.text_tokens import TextTokenizer

ESCAPE = "\ufdd2"  # a Unicode noncharacter, which no text should contain


class SpecialTokenEscaper:
    """Builds a second tokenizer whose special tokens are spelled with the prefix ESCAPE; else it equals `core`."""

    def __init__(self, core: Tokenizer, special_pattern: re.Pattern[str], special_tokens: Iterable[str]):
        self._core = core
        self._special_pattern = special_pattern
        self._special_tokens = set(special_tokens)

    def escape(self, text: str) -> str:
        """Return the text with the prefix ESCAPE before each special token."""
        return self._special_pattern.sub(lambda match: ESCAPE + match[0], text)

    def added_length(self, text: str, end: int) -> int:
        """Return how many characters `escape` adds to `text[:end]`."""
        return len(self._special_pattern.findall(text, 0, end)) * len(ESCAPE)

    @cached_property
    def tokenize(self) -> TextTokenizer:
        """Return the second tokenizer, for escaped texts. Its ids of added tokens differ from those of `core`."""
        settings = json.loads(self._core.to_str()) | {"post_processor": None}
        for token in settings["added_tokens"]:
            if token["content"] in self._special_tokens:
                token["content"] = ESCAPE + token["content"]
        return TextTokenizer(Tokenizer.from_str(json.dumps(settings)))

    def original_ids(self, ids: list[int]) -> list[int]:
        """Return the ids in `core` of tokens from the second tokenizer."""
        return [self._original_id.get(token_id, token_id) for token_id in ids]

    @cached_property
    def _original_id(self) -> dict[int, int]:
        added = self.tokenize.core.get_added_tokens_decoder()
        names = {token_id: token.content.removeprefix(ESCAPE) for token_id, token in added.items()}
        return {token_id: self._core.token_to_id(name) for token_id, name in names.items()}
