"""Texts -> token ids, and which text each token stands for."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate

from tokenizers import Encoding, Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPACES = ("\u2581", "\u0120", "\u010a", "\u0109", "\u010d")  # white space at a token's start, as vocabularies spell it


class ByteTokens:
    """The tokens of a text in a byte-level vocabulary: together they are its bytes, which is what places them."""

    def __init__(self, text: str, ids: list[int], pieces: list[bytes]):
        self.text, self.ids = text, ids
        self.starts = list(accumulate(map(len, pieces), initial=0))

    def first_from(self, char: int) -> int:
        """The first token that begins at a character or after it."""
        return bisect_left(self.starts, len(self.text[:char].encode()))

    def first_in(self, char: int) -> int:
        """The token that holds the character."""
        return bisect_left(self.starts, len(self.text[:char].encode()) + 1) - 1

    def shown(self, first: int, last: int) -> str | None:
        """None: tokens [first, last) are known to mean what stands there."""
        return None


class OffsetTokens:
    """The tokens of a text where the tokenizer's own offsets tell what each stands for."""

    def __init__(self, text: str, core: Tokenizer, encoding: Encoding):
        self.text, self.core, self.encoding, self.ids = text, core, encoding, encoding.ids

    def first_from(self, char: int) -> int:
        """The first token that begins at a character or after it."""
        token = self.first_in(char)
        while token < len(self.ids) and self.encoding.token_to_chars(token)[0] < char:
            token += 1
        if 0 < token < len(self.ids) and self.encoding.token_to_chars(token - 1)[1] < char:
            # White space before the character is in no token, or offsets do not tell (byte-level BPE trims them).
            token += self.core.id_to_token(self.ids[token]).startswith(SPACES)
        return token

    def first_in(self, char: int) -> int:
        """The token that holds the character, or the next one."""
        tokens = (self.encoding.char_to_token(position) for position in range(char, len(self.text)))
        return next((token for token in tokens if token is not None), len(self.ids))

    def shown(self, first: int, last: int) -> str | None:
        """What stands where tokens [first, last) are."""
        # The first bytes of the first character may be in a token before.
        begin, before = (
            self.encoding.token_to_chars(first)[0],
            self.encoding.token_to_chars(first - 1)[1] if first else 0,
        )
        return self.text[max(begin, before) : self.encoding.token_to_chars(last - 1)[1]]


Tokens = ByteTokens | OffsetTokens


class TextTokenizer:
    """Tokenises texts as they are: no special tokens are added, nothing is cut or padded."""

    def __init__(self, core: Tokenizer):
        self.core = core
        core.no_truncation()
        core.no_padding()

    @cached_property
    def bytes_of(self) -> list[bytes]:
        """What each token of a byte-level vocabulary stands for, by its id; nothing for other vocabularies.

        Takes a moment, which a run that finds its tokens stored does not need.
        """
        return _token_bytes(self.core)

    def __call__(self, texts: Sequence[str]) -> Iterator[Tokens]:
        """The tokens of each text, in order, tokenised together.

        For a byte-level vocabulary the ids are enough, which takes a third less time than with offsets; a text that
        its bytes do not add up to (a normaliser changed it) is tokenised again, with them.
        """
        if not self.bytes_of:
            for text, encoding in zip(texts, self.core.encode_batch(texts, add_special_tokens=False), strict=True):
                yield OffsetTokens(text, self.core, encoding)
            return
        for text, encoding in zip(texts, self.core.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            ids = encoding.ids
            pieces = list(map(self.bytes_of.__getitem__, ids))
            if b"".join(pieces) == text.encode():
                yield ByteTokens(text, ids, pieces)
            else:
                yield OffsetTokens(text, self.core, self.core.encode(text, add_special_tokens=False))


def _token_bytes(core: Tokenizer) -> list[bytes]:
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    added = core.get_added_tokens_decoder()
    found = {number: token.content.encode() for number, token in added.items()}
    for token, number in core.get_vocab(with_added_tokens=True).items():
        if number not in added:
            try:
                found[number] = bytes(byte_of[char] for char in token)
            except KeyError:
                return []
    return [found.get(number, b"") for number in range(max(found) + 1)]
