"""Build tiny encoder-decoder models with their tokenizers: T5, BART and T5Gemma 2."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
    set_seed,
)

from tests.support import tiny

PAD, EOS, BOS = "<pad>", "</s>", "<s>"
T5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
BART = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4,
    decoder_attention_heads=4, max_position_embeddings=128, dropout=0.0,
)  # fmt: skip
GEMMA = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=512, sliding_window=64, vocab_size=512, layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)


def build_tokenizer(adds: str) -> PreTrainedTokenizerFast:
    """Train a tokenizer without a chat template that puts special tokens around a text: `adds` is "$A </s>"."""
    tokenizer = tiny.build_tokenizer(None, [PAD, EOS, BOS], EOS, bos_token=BOS)
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (EOS, BOS)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=adds, special_tokens=tokens)
    return tokenizer


def build_model(folder: Path, kind: str = "t5", **overrides: Any) -> Path:
    """Save a tiny t5, bart or t5gemma2 with random weights and its tokenizer as a Hugging Face folder."""
    set_seed(0)
    ids = dict(pad_token_id=0, eos_token_id=1)
    if kind == "t5":
        tokenizer = build_tokenizer(f"$A {EOS}")
        model: Any = T5ForConditionalGeneration(
            T5Config(vocab_size=512, decoder_start_token_id=0, **{**T5, **ids, **overrides})
        )
    elif kind == "bart":
        tokenizer = build_tokenizer(f"{BOS} $A {EOS}")
        settings = {**BART, **ids, "bos_token_id": 2, "decoder_start_token_id": 1, **overrides}
        model = BartForConditionalGeneration(BartConfig(vocab_size=512, **settings))
    else:
        tokenizer = build_tokenizer(f"{BOS} $A")
        text = {**GEMMA, **ids, "bos_token_id": 2, **overrides}
        encoder = dict(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=511)
        model = T5Gemma2ForConditionalGeneration(
            T5Gemma2Config(encoder=encoder, decoder=text, image_token_index=511, **ids)
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def write_untied_head(folder: Path) -> Path:
    """Give the t5 of a folder a head that is not its embeddings, as FLAN-T5 and mT5 have; config.json stays."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    head = torch.randn(weights["shared.weight"].shape, generator=torch.Generator().manual_seed(1)) / 10
    save_file(weights | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    return folder
