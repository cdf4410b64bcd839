"""Writes a byte-level BPE tokenizer into a GGUF file, and reads it back."""

import json
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

from sft_recipe.errors import ModelError
from sft_recipe.models.tokenizer import special_tokens

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is split before merging, as llama.cpp names it: (the regular expression, single digits, GPT-2's expression).
SPLITS = {
    (CONTRACTIONS + r"\p{N}{1,3}" + REST, False, False): "llama-bpe",
    (CONTRACTIONS + r"\p{N}" + REST, False, False): "qwen2",
    (None, True, True): "smollm",
    (None, False, True): "gpt-2",
}
TYPES = gguf.TokenType


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocabulary: int, end_ids: list[int]
) -> None:
    """Add vocabulary, merges, special tokens and chat template.

    Ids that the model has and the tokenizer has not, up to `vocabulary`, become unused tokens. Nothing is put before a
    text: the chat template has the bos token where the model was trained with one. Raises ModelError for a tokenizer
    that is no byte-level BPE, or splits text in a way that llama.cpp has no name for.
    """
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(core, str(tokenizer.name_or_path)))
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    special = special_tokens(tokenizer)
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    tokens = [names.get(number, f"[PAD{number}]") for number in range(vocabulary)]
    kinds = [
        TYPES.UNUSED
        if number not in names
        else TYPES.CONTROL
        if token in special
        else TYPES.USER_DEFINED
        if token in added
        else TYPES.NORMAL
        for number, token in enumerate(tokens)
    ]
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in core["model"]["merges"]])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if end_ids:
        writer.add_eos_token_id(end_ids[-1])
        writer.add_eot_token_id(end_ids[-1])
    writer.add_add_bos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def split_name(core: dict[str, Any], name: str) -> str:
    """Return llama.cpp's name for the way in which the tokenizer.json `core` splits text. Raises ModelError."""
    model, split = core["model"], core["pre_tokenizer"] or {}
    parts = split.get("pretokenizers", [split])
    levels = [part for part in parts if part.get("type") == "ByteLevel"]
    if model.get("type") != "BPE" or not levels or levels[0]["add_prefix_space"]:
        raise ModelError(f"--format gguf: {name} has no byte-level BPE tokenizer; use --format hf")

    expressions = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split"]
    digits = any(part["type"] == "Digits" and part["individual_digits"] for part in parts)
    key = (expressions[0] if expressions else None, digits, levels[0]["use_regex"])
    known = SPLITS.get(key) if {part["type"] for part in parts} <= {"Split", "Digits", "ByteLevel"} else None
    if known is None or len(expressions) > 1 or bool(model.get("ignore_merges")) != (known == "llama-bpe"):
        raise ModelError(
            f"--format gguf: {name} splits text in another way than the tokenizers that are known here "
            f"({', '.join(SPLITS.values())}), so llama.cpp would compute other tokens; use --format hf"
        )
    return known


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer that a GGUF file describes, built from its vocabulary, merges and types only."""
    fields = gguf.GGUFReader(path).fields
    tokens, kinds, merges, pre = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges", "pre")
    )
    expression, digits, use_regex = next(key for key, name in SPLITS.items() if name == pre)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [tuple(pair.split(" ")) for pair in merges]
    tokenizer = Tokenizer(BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    parts: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)]
    if digits:
        parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if expression:
        from tokenizers import Regex

        parts.insert(0, pre_tokenizers.Split(Regex(expression), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (TYPES.CONTROL, TYPES.USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == TYPES.CONTROL, normalized=False)])
    return tokenizer
