"""Streamed text joins to the text of all tokens, and splits at the tags of reasoning wherever the pieces end."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_recipe.chat.text_stream import IncrementalDecoder, ReasoningSplitter, StopStrings
from tests.support import tiny

TOKENIZER = tiny.build_tokenizer()
TAGS = tiny.build_tokenizer(special_tokens=[*tiny.SPECIAL, "<think>", "</think>"])


def streamed(ids, tokenizer=TOKENIZER):
    decoder = IncrementalDecoder(tokenizer)
    return [*map(decoder.put, ids), decoder.end()]


@given(st.text().filter(lambda text: "<|" not in text))
@settings(max_examples=200)
def test_pieces_join_to_the_text(text):
    assert "".join(streamed(TOKENIZER(text, add_special_tokens=False)["input_ids"])) == text


@given(st.lists(st.integers(3, len(TOKENIZER) - 1), max_size=60))
@settings(max_examples=200)
def test_pieces_of_any_tokens_join_to_the_decoding_of_all(ids):
    """Tokens of a model with random weights are bytes that are no characters."""
    assert "".join(streamed(ids)) == TOKENIZER.decode(ids)


def test_no_piece_is_half_a_character():
    pieces = streamed(TOKENIZER("龘龘")["input_ids"])
    assert [piece for piece in pieces if piece] == ["龘", "龘"]


def test_special_tokens_have_no_text_except_the_tags_of_reasoning():
    ids = TAGS("<|im_start|><think>a</think>b<|im_end|>")["input_ids"]
    assert "".join(streamed(ids, TAGS)) == "<think>a</think>b"


def cut(text: str, seed: int) -> list[str]:
    chance = random.Random(seed)
    pieces, start = [], 0
    while start < len(text):
        end = start + chance.randint(1, 4)
        pieces.append(text[start:end])
        start = end
    return pieces


def split(pieces: list[str], inside: bool = False) -> dict[str, str]:
    splitter = ReasoningSplitter(inside)
    found = [piece for text in pieces for piece in splitter.feed(text)]
    found += splitter.end()
    assert all(piece.text for piece in found)
    return {kind: "".join(p.text for p in found if p.kind == kind) for kind in ("reasoning", "answer")}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "answer"),
    [
        ("Four.", False, "", "Four."),
        ("  Four. \n", False, "", "  Four. \n"),
        ("<think>\n2 + 2\n\nis 4\n</think>\n\nFour.", False, "2 + 2\n\nis 4", "Four."),
        ("\n<think>\n\n</think>\n\nFour.", False, "", "Four."),
        ("2 < 3\n</think>\n\nFour </think> <think>.", True, "2 < 3", "Four </think> <think>."),
        ("<think>2 + 2 </thin", False, "2 + 2 </thin", ""),
        ("still thinking\n", True, "still thinking", ""),
        ("a <think>b</think>", False, "", "a <think>b</think>"),
        ("<thi", False, "", "<thi"),
        ("", True, "", ""),
    ],
)
def test_reasoning_is_split_wherever_the_pieces_end(text, inside, reasoning, answer, seed):
    assert split(cut(text, seed), inside) == {"reasoning": reasoning, "answer": answer}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("one\n\ntwo", ("\n\n",), "one"),
        ("one\ntwo", ("\n\n",), "one\ntwo"),
        ("aab aac", ("aac", "b "), "aa"),
        ("ends with a star*", ("**",), "ends with a star*"),
        ("all", (), "all"),
    ],
)
def test_text_ends_before_the_first_stop_string(text, stops, shown, seed):
    stream = StopStrings(stops)
    assert "".join([*map(stream.feed, cut(text, seed)), stream.end()]) == shown
    assert stream.found == any(stop in text for stop in stops)
