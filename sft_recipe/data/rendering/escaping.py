"""Special tokens under other names, so that data which spells the usual ones (`<|im_start|>assistant`) is only text."""

import json
import re
from collections.abc import Iterable
from functools import cached_property

from tokenizers import Tokenizer

from sft_recipe.data.rendering.text_tokens import TextTokenizer

# No text holds it: Unicode gives it to no character.
MARK = "\ufdd2"


class SpecialTokenEscaper:
    """A second tokenizer that knows `MARK<|im_end|>` as the token, and `<|im_end|>` as seven characters or so.

    Everything else is as in `core`, and `ids` gives back the ids of `core`.
    """

    def __init__(self, core: Tokenizer, special: re.Pattern[str], specials: Iterable[str]):
        self._core = core
        self._special = special
        self._specials = set(specials)

    def mark(self, text: str) -> str:
        """The template's own text, with each special token under its other name."""
        return self._special.sub(lambda found: MARK + found[0], text)

    def marks_before(self, text: str, end: int) -> int:
        """How many characters `mark` puts into `text[:end]`."""
        return len(self._special.findall(text, 0, end)) * len(MARK)

    @cached_property
    def tokenize(self) -> TextTokenizer:
        settings = json.loads(self._core.to_str()) | {"post_processor": None}
        for token in settings["added_tokens"]:
            if token["content"] in self._specials:
                token["content"] = MARK + token["content"]
        return TextTokenizer(Tokenizer.from_str(json.dumps(settings)))

    @cached_property
    def _own_ids(self) -> dict[int, int]:
        """The second tokenizer numbers added tokens anew."""
        added = self.tokenize.core.get_added_tokens_decoder()
        names = {number: token.content.removeprefix(MARK) for number, token in added.items()}
        return {number: self._core.token_to_id(name) for number, name in names.items()}

    def ids(self, guarded: list[int]) -> list[int]:
        return [self._own_ids.get(number, number) for number in guarded]
