"""Independent oracles for ids and masks: transformers' own rendering, and marks counted in bytes."""

import os
import re

import pytest
from hypothesis import HealthCheck, Phase, settings
from transformers.utils.chat_template_utils import render_jinja_template

from tests.data.rendering.templates import CASES, STYLES

SEARCH = int(os.environ.get("MASK_EXAMPLES", "0"))


def examples(count):
    return settings(
        max_examples=SEARCH or count,
        derandomize=not SEARCH,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


each_case = pytest.mark.parametrize(("name", "kind"), CASES, ids=map("-".join, CASES))


TOKENIZERS = {(name, kind): STYLES[name].tokenizer(kind) for name, kind in CASES}


def special_ids(tokenizer):
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def as_dicts(conversation):
    """The turns as chat templates want them."""
    turns = []
    for m in conversation.messages:
        fields = {"reasoning_content": m.reasoning, "tool_calls": list(m.tool_calls)}
        fields |= {"name": m.name, "tool_call_id": m.tool_call_id}
        turns.append({"role": m.role, "content": m.content} | {key: value for key, value in fields.items() if value})
    return turns


def own_ids(tokenizer, conversation, **kwargs):
    tools = list(conversation.tools) or None
    return tokenizer.apply_chat_template(
        as_dicts(conversation), tools=tools, tokenize=True, return_dict=False, **kwargs
    )


def rendered(tokenizer, template, conversation, **kwargs):
    """The text of a conversation, and where {% generation %} marks are in it."""
    [text], [spans] = render_jinja_template(
        [as_dicts(conversation)],
        tools=list(conversation.tools) or None,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
        **kwargs,
    )
    return text, spans


def transformers_mask(tokenizer, template, conversation):
    """The library's own mask."""
    return tokenizer.apply_chat_template(
        as_dicts(conversation),
        tools=list(conversation.tools) or None,
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )["assistant_masks"]


def _byte_letters():
    """GPT-2's letters for the 256 bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + number): byte for number, byte in enumerate(hidden)}


BYTES = _byte_letters()


def begins(name, kind, ids, text):
    """The byte of the text at which each token begins, counted along what each token stands for.

    Fails if the tokens spell anything but the text.
    """
    tokenizer, data, position, fresh, found = TOKENIZERS[name, kind], text.encode(), 0, True, []
    for number, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        found.append(position)
        added = number in tokenizer.added_tokens_decoder
        if added:
            piece = token.encode()
        elif kind == "bytes":
            piece = bytes(BYTES[letter] for letter in token)
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            piece = bytes([int(token[3:5], 16)])
        else:
            piece = token.replace("▁", " ").encode()
            if kind == "prepend" and fresh:
                piece = piece[1:]
        assert data[position:].startswith(piece), f"{token!r} stands for {data[position : position + 20]!r}"
        position += len(piece)
        if token in STYLES[name].swallow and added:
            position += len(re.match(r"[^\S\x1c-\x1f]*", data[position:].decode())[0].encode())
        fresh = added
    assert position == len(data)
    return found


def in_bytes(text, spans):
    return [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]


def truth(name, kind, ids, conversation, chosen=None, **kwargs):
    """1 on each token that begins in a marked span; `chosen` says per assistant turn if it counts."""
    tokenizer = TOKENIZERS[name, kind]
    text, spans = rendered(tokenizer, STYLES[name].marked(), conversation, **kwargs)
    places = begins(name, kind, ids, text)
    spans = [span for span, yes in zip(in_bytes(text, spans), chosen or [True] * len(spans), strict=True) if yes]
    mask = [int(any(start <= place < end for start, end in spans)) for place in places]
    return [0, *mask[1:]]


def straddlers(name, kind, ids, conversation):
    """The tokens that hold the start of a turn, but begin before."""
    text, spans = rendered(TOKENIZERS[name, kind], STYLES[name].marked(), conversation)
    places = begins(name, kind, ids, text)
    ends = [*places[1:], len(text.encode())]
    starts = [start for start, _ in in_bytes(text, spans)]
    return {
        index
        for index, place in enumerate(places)
        if index == 0 or any(place < start < ends[index] for start in starts)
    }
