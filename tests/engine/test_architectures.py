"""Losses and saved folders of tiny models of many architectures; benchmarks/architectures.py has all of them."""

import pytest

from benchmarks.architectures import SAME, examine, tiny_config

# One for each kind of attention, positions, head and experts that the engine treats differently.
KINDS = [
    "gpt2",  # learned positions, another layout of linear layers
    "opt",  # the hidden states come from another module than the model's base
    "bloom",  # takes no positions: documents one by one
    "falcon",  # its code has another attention
    "gpt_neo",  # alternates windows
    "phi",  # a head with bias
    "gpt_oss",  # sinks and experts
    "gemma2",  # soft-capping and windows
    "deepseek_v2",  # latent attention
]
MORE = [
    "codegen", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4", "gpt_bigcode",
    "gpt_neox", "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "mistral", "mixtral", "mpt", "nemotron",
    "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss",
    "smollm3", "stablelm", "starcoder2",
]  # fmt: skip


def check(name, folder):
    config = tiny_config(name)
    assert config is not None
    result = examine(name, config, folder)
    assert result.is_right, result


@pytest.mark.parametrize("name", KINDS)
def test_full_lora_and_merged_equal_a_plain_loop(name, tmp_path):
    check(name, tmp_path)


def test_attention_in_chunks_equals_a_plain_loop(tmp_path):
    """Documents are longer than a chunk, and packed. LoRA on all linear layers breaks its router: refused in words."""
    result = examine("llama4_text", tiny_config("llama4_text"), tmp_path)
    assert max(result.differences["full"]) <= SAME
    assert "does not run with LoRA on all-linear" in result.refusal


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_architectures_equal_a_plain_loop(name, tmp_path):
    check(name, tmp_path)
