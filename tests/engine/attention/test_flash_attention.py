"""FlashAttention's packages, as far as that shows without a GPU: which one a model gets, and what it is called with."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, modeling_flash_attention_utils

from sft_recipe.config import auto
from sft_recipe.engine import patches
from sft_recipe.engine.attention import packed
from sft_recipe.engine.attention.prefix_sharing import concatenate

LENGTHS = [5, 1, 9, 3]
NAMES = [name for name, _, _ in auto.FLASH_ATTENTION]
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, pad_token_id=0,
)  # fmt: skip


def varlen_attention(calls):
    """A package's function for documents in a row, as a loop; it records what it is called with."""

    def attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        assert causal
        calls.append((cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
        lengths = cu_seqlens_q.diff().tolist()
        parts = zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (q, k, v)), strict=True)
        attended = [
            torch.nn.functional.scaled_dot_product_attention(
                *(tensor[None] for tensor in part), is_causal=True, scale=softmax_scale, enable_gqa=True
            )
            for part in parts
        ]
        return torch.cat(attended, dim=2)[0].transpose(0, 1)

    return attend


@pytest.mark.parametrize("name", NAMES)
def test_packages_are_called_with_the_borders_of_documents(monkeypatch, name):
    calls = []
    functions = (None, varlen_attention(calls), None, None, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *_, **__: functions)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **SIZES), attn_implementation="sdpa")
    documents = [torch.randint(64, (length,)) for length in LENGTHS]
    alone = torch.cat([model(input_ids=ids[None]).logits[0] for ids in documents])
    patches.set_attention_implementation(model.config, name)
    segments = concatenate(LENGTHS).segments
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    inputs = packed.attention_inputs(model, segments, model.device)
    together = model(input_ids=torch.cat(documents)[None], position_ids=positions, **inputs).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2  # one for each layer
    for offsets, key_offsets, longest, longest_keys in calls:
        assert offsets.tolist() == key_offsets.tolist() == [0, 5, 6, 15, 18] and offsets.dtype == torch.int32
        assert longest == longest_keys == 9 and type(longest) is int  # else a GPU is waited for


def test_other_attention_gets_no_borders():
    model = SimpleNamespace(config=AutoConfig.for_model("qwen3", **SIZES))
    patches.set_attention_implementation(model.config, "sdpa")
    assert packed.attention_inputs(model, concatenate(LENGTHS).segments, torch.device("cpu")) == {}


@pytest.mark.parametrize(
    ("kind", "name", "largest_head", "expected"),
    [
        ("qwen3", "flash_attention_2", 256, "flash_attention_2"),
        ("qwen3", "flash_attention_4", 256, "flash_attention_4"),
        ("gemma3_text", "flash_attention_4", 128, auto.PACKED_ATTENTION),  # its heads have 256
        ("gemma3_text", "flash_attention_2", 256, "flash_attention_2"),
        ("gpt_oss", "flash_attention_2", 256, auto.PACKED_ATTENTION),  # no attention sinks
        ("gpt_oss", "flash_attention_4", 256, "flash_attention_4"),
        ("ctrl", "flash_attention_2", 256, "eager"),
    ],
)
def test_a_model_that_a_package_does_not_fit_gets_another_attention(monkeypatch, kind, name, largest_head, expected):
    def attend(module, head_size):
        if head_size > largest_head:
            raise RuntimeError("head_dim must be at most 128")

    auto.flash_attention_runs.cache_clear()
    monkeypatch.setattr(auto, "_attend", attend)
    monkeypatch.setattr(auto, "import_module", lambda name: SimpleNamespace(flash_attn_varlen_func=name))
    config = AutoConfig.for_model(kind)
    patches.set_attention_implementation(config, name)
    assert packed.supported_attention(config) == expected
    auto.flash_attention_runs.cache_clear()


@pytest.mark.parametrize(
    ("hip", "capability", "works", "expected"),
    [
        (None, (8, 0), False, True),
        (None, (7, 5), True, False),
        ("7.1", (9, 4), True, True),
        ("7.1", (9, 4), False, False),
    ],
)
def test_pytorchs_flash_attention_is_tried_on_gpus_of_amd(monkeypatch, caplog, hip, capability, works, expected):
    def varlen_attn(query, *_, **__):
        if not works:
            raise RuntimeError("FlashAttention for ROCm has no sliding windows")
        return query * 2

    packed._runs_varlen.cache_clear()
    monkeypatch.setattr(packed, "varlen_attn", varlen_attn)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    tensor = SimpleNamespace(shape=(1, 2, 5, 64), dtype=torch.bfloat16, is_cuda=True, device=torch.device("cpu"))
    assert packed._supports_varlen(tensor, tensor) is expected
    assert ("no sliding windows" in caplog.text) is (hip is not None and not works)
    packed._runs_varlen.cache_clear()
