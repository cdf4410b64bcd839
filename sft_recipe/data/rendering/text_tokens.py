"""Tokenizes texts, and maps between tokens and characters."""

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any
from unicodedata import normalize

from tokenizers import Encoding, Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

# White space at the start of a token, as vocabularies spell it: sentencepiece's space; byte-level space, newline,
# tab and carriage return.
SPACES = ("\u2581", "\u0120", "\u010a", "\u0109", "\u010d")


class ByteTokens:
    """Holds the tokens of a text in a byte-level vocabulary.

    `pieces` are the bytes of each token. They join to the bytes of the text, so that each token's position is known.
    """

    def __init__(self, text: str, ids: list[int], pieces: list[bytes]):
        self.text, self.ids = text, ids
        self.starts = list(accumulate(map(len, pieces), initial=0))

    def first_token_from(self, char: int) -> int:
        """Return the index of the first token that starts at this character or after it."""
        return bisect_left(self.starts, len(self.text[:char].encode()))

    def token_at(self, char: int) -> int:
        """Return the index of the token that contains this character."""
        return bisect_left(self.starts, len(self.text[:char].encode()) + 1) - 1

    def text_before(self, token: int, char: int) -> str:
        """Return the text from this character to the start of a token, which may begin inside a character."""
        count = self.starts[token] - len(self.text[:char].encode())
        return self.text[char : char + count].encode()[: max(count, 0)].decode(errors="replace")

    def source_text(self, first: int, last: int) -> str | None:
        """Return None: tokens [first, last) are known to decode to the text that they come from."""
        return None


class OffsetTokens:
    """Holds the tokens of a text whose positions are the tokenizer's character offsets."""

    def __init__(self, text: str, core: Tokenizer, encoding: Encoding):
        self.text, self.core, self.encoding, self.ids = text, core, encoding, encoding.ids

    def first_token_from(self, char: int) -> int:
        """Return the index of the first token that starts at this character or after it."""
        token = self.token_at(char)
        while token < len(self.ids) and self.encoding.token_to_chars(token)[0] < char:
            token += 1
        if 0 < token < len(self.ids) and self.encoding.token_to_chars(token - 1)[1] < char:
            # The white space before the character is in no token or, as byte-level BPE trims offsets, in this one.
            token += self.core.id_to_token(self.ids[token]).startswith(SPACES)
        return token

    def token_at(self, char: int) -> int:
        """Return the index of the token that contains this character, or of the next token if none does."""
        tokens = (self.encoding.char_to_token(position) for position in range(char, len(self.text)))
        return next((token for token in tokens if token is not None), len(self.ids))

    def text_before(self, token: int, char: int) -> str:
        """Return the text from this character to the end of the token before."""
        return self.text[char : self.encoding.token_to_chars(token - 1)[1]] if token else ""

    def source_text(self, first: int, last: int) -> str | None:
        """Return the text that tokens [first, last) come from."""
        start = self.encoding.token_to_chars(first)[0]
        # The token before may contain the first bytes of the first character.
        end_before = self.encoding.token_to_chars(first - 1)[1] if first else 0
        return self.text[max(start, end_before) : self.encoding.token_to_chars(last - 1)[1]]


Tokens = ByteTokens | OffsetTokens


class TextTokenizer:
    """Tokenizes texts without adding special tokens, truncation or padding."""

    def __init__(self, core: Tokenizer):
        self.core = core
        core.no_truncation()
        core.no_padding()

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """Return the bytes of each token by its id if the vocabulary is byte-level, else [].

        Computed on first use: a run that finds its tokens in the store does not need it.
        """
        return _token_bytes(self.core)

    @cached_property
    def _form(self) -> str:
        """The Unicode form of the texts before they are tokenized ("NFC", or "" for the given one), "?" if unknown."""
        settings = json.loads(self.core.to_str())
        normalizers = [step["type"] for step in _steps(settings["normalizer"])]
        keeps_text = set(normalizers) <= {"NFC"} and all(map(_keeps_text, _steps(settings["pre_tokenizer"])))
        takes_space = any(token["lstrip"] or token["rstrip"] for token in settings["added_tokens"])
        is_known = bool(self.token_bytes) and keeps_text and not takes_space
        return "".join(normalizers[:1]) if is_known else "?"

    def least_tokens(self, text: str, added_bytes: int = 0) -> int:
        """Return a number of tokens that a text has at least, found without tokenizing it; 0 if nothing is certain.

        No token of a byte-level vocabulary has more bytes than the longest one; bytes that the vocabulary lacks may
        become no token. `added_bytes` is the number of bytes by which tokens of the text may be longer.
        """
        if self._form == "?":
            return 0
        normal = normalize("NFC", text) if self._form else text
        # Half: the libraries know different versions of Unicode, and normalize around special tokens differently.
        known = normal.encode().translate(None, delete=self._lacking_bytes)
        return len(known) // (max(map(len, self.token_bytes)) + added_bytes) // 2

    @cached_property
    def _lacking_bytes(self) -> bytes:
        return bytes(set(range(256)) - {piece[0] for piece in self.token_bytes if len(piece) == 1})

    def __call__(self, texts: Sequence[str]) -> Iterator[Tokens]:
        """Tokenize texts as one batch; yields the tokens of each text in order.

        For a byte-level vocabulary the ids are sufficient, which takes a third less time than offsets. A text whose
        tokens do not join to its bytes, because a normalizer changed it, is tokenized again with offsets.
        """
        if not self.token_bytes:
            for text, encoding in zip(texts, self.core.encode_batch(texts, add_special_tokens=False), strict=True):
                yield OffsetTokens(text, self.core, encoding)
            return
        for text, encoding in zip(texts, self.core.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            ids = encoding.ids
            pieces = list(map(self.token_bytes.__getitem__, ids))
            if b"".join(pieces) == text.encode():
                yield ByteTokens(text, ids, pieces)
            else:
                yield OffsetTokens(text, self.core, self.core.encode(text, add_special_tokens=False))


def _steps(settings: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of others."""
    if settings is None:
        return []
    if settings["type"] != "Sequence":
        return [settings]
    parts = settings["normalizers"] if "normalizers" in settings else settings["pretokenizers"]
    return [step for part in parts for step in _steps(part)]


def _keeps_text(pre_tokenizer: dict[str, Any]) -> bool:
    if pre_tokenizer["type"] == "Split":
        return pre_tokenizer["behavior"] != "Removed"
    return pre_tokenizer["type"] in ("ByteLevel", "Digits")


def _token_bytes(core: Tokenizer) -> list[bytes]:
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    added = core.get_added_tokens_decoder()
    pieces = {token_id: token.content.encode() for token_id, token in added.items()}
    for token, token_id in core.get_vocab(with_added_tokens=True).items():
        if token_id not in added:
            try:
                pieces[token_id] = bytes(byte_of[char] for char in token)
            except KeyError:
                return []
    return [pieces.get(token_id, b"") for token_id in range(max(pieces) + 1)]
