"""Builds tiny models that give a chosen answer: the next token depends on the last one alone."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support import tiny

STRENGTH = 40.0  # of the logit of the next token; sampling at temperature 1 then always takes it


def build_scripted_model(folder: Path, answer: str, tokenizer=None, prompt_end: str = "\n", **generation) -> Path:
    """Save a model that answers any prompt that ends with the token `prompt_end` with `answer`.

    The tokens of the answer must all differ. `generation` goes into generation_config.json.
    """
    tokenizer = tokenizer or tiny.build_tokenizer()
    vocabulary = len(tokenizer)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=vocabulary + vocabulary % 2,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    weights = model.state_dict()
    for name, value in weights.items():
        value.fill_(1.0 if "norm" in name else 0.0)
    weights["model.embed_tokens.weight"].fill_diagonal_(1.0)
    (first,) = tokenizer(prompt_end)["input_ids"]
    chain = [first, *tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    assert len(set(chain)) == len(chain), "a token of the answer occurs twice"
    for token, following in zip(chain, chain[1:], strict=False):
        weights["lm_head.weight"][following, token] = STRENGTH / config.hidden_size**0.5
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id, **generation}))
    return folder


def build_adapter(folder: Path, base: Path, first: str, instead: str, prompt_end: str = "\n") -> Path:
    """Save a LoRA adapter of rank 1 on the head, with which the answer begins with `instead` in place of `first`."""
    tokenizer = tiny.build_tokenizer()
    (end,), (old,), (new,) = (tokenizer(text)["input_ids"] for text in (prompt_end, first, instead))
    config = json.loads((base / "config.json").read_text())
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    down, up = torch.zeros(1, hidden), torch.zeros(vocabulary, 1)
    down[0, end] = 1.0
    up[new, 0], up[old, 0] = 2 * STRENGTH / hidden**0.5, -2 * STRENGTH / hidden**0.5
    folder.mkdir(parents=True)
    names = {"A": down, "B": up}
    save_file(
        {f"base_model.model.lm_head.lora_{name}.weight": value for name, value in names.items()},
        folder / "adapter_model.safetensors",
    )
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["lm_head"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
