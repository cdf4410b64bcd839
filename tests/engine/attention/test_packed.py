"""Packed attention against a padded, masked batch of the same documents, which transformers computes in its own way."""

import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from sft_recipe.engine.attention import packed as attention
from sft_recipe.engine.attention import prefix_sharing as packs
from sft_recipe.engine.attention.packed import PACKED, best_attention, packed_documents
from sft_recipe.engine.attention.prefix_sharing import Segment, concatenate, share_prefixes
from sft_recipe.engine.cpu import blockwise_attention as blockwise
from sft_recipe.errors import ModelError

LENGTHS = [11, 5, 1, 20, 5]
WINDOW = 6  # some documents are longer, some shorter
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64)  # fmt: skip
LOCAL = dict(sliding_window=WINDOW)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
MODELS = {
    "llama": dict(num_hidden_layers=2),
    "qwen2": dict(num_hidden_layers=2, use_sliding_window=True, max_window_layers=1, **LOCAL),
    "qwen3": dict(num_hidden_layers=2),
    "mistral": dict(num_hidden_layers=2, **LOCAL),
    "phi3": dict(num_hidden_layers=2, **LOCAL),
    "gemma2": dict(num_hidden_layers=2, attn_logit_softcapping=0.5, query_pre_attn_scalar=3, **LOCAL),
    "gemma3_text": dict(num_hidden_layers=6, query_pre_attn_scalar=3, **LOCAL),
    "gpt_oss": dict(num_hidden_layers=2, **LOCAL, **EXPERTS),
    "granite": dict(num_hidden_layers=2, attention_multiplier=0.3),
}


def build(kind, implementation, dtype=torch.float32, **settings):
    config = AutoConfig.for_model(kind, **SIZES, **{**MODELS.get(kind, {}), **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype)
    with torch.no_grad():  # scores that differ, sinks and soft caps that bite
        for name, parameter in model.named_parameters():
            parameter.mul_(4.0) if "_proj" in name else parameter
            parameter.normal_() if "sinks" in name else parameter
    return model


@pytest.fixture(autouse=True)
def forget_masks():
    attention._known_masks.clear()
    yield
    attention._known_masks.clear()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def shared_logits(model, ids):
    """Of the documents, one after the other, through a pack in which their beginnings stand once."""
    documents = ids[0].split(LENGTHS)
    pack = share_prefixes([document.numpy() for document in documents])
    assert any(segment.prefix for segment in pack.segments) and pack.segments[-1].end < ids.shape[1]
    rows = torch.from_numpy(pack.rows)
    tokens, positions = (torch.empty(pack.segments[-1].end, dtype=torch.long) for _ in range(2))
    tokens[rows] = ids[0]
    positions[rows] = torch.cat([torch.arange(length) for length in LENGTHS])
    with packed_documents(pack.segments):
        return model(input_ids=tokens[None], position_ids=positions[None], use_cache=False).logits[0, rows]


def packed_logits(model, ids, lengths=tuple(LENGTHS)):
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with packed_documents(concatenate(lengths).segments):
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]


def padded_logits(model, ids):
    documents = ids[0].split(LENGTHS)
    padded = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(document) for document in documents], batch_first=True)
    logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    return torch.cat([row[:length] for row, length in zip(logits, LENGTHS, strict=True)])


def gradients(model, logits, ids):
    model.zero_grad()
    F.cross_entropy(logits.float(), ids[0].roll(-1)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_equal(reference, expected, model, found, ids, atol):
    """The logits `found` of a model are the `expected` ones of another, and their gradients within `atol`."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    wanted, got = gradients(reference, expected, ids), gradients(model, found, ids)
    assert wanted.keys() == got.keys() and len(got) > 10
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=atol, msg=name)


def computes_no_full_mask(caplog):
    return attention.__name__ not in [record.name for record in caplog.records]


@pytest.fixture(scope="module")
def alike(ids):
    """The same lengths: two share 4 tokens, two 10, and one is the beginning of another."""
    documents = [part.clone() for part in ids[0].split(LENGTHS)]
    documents[1][:4] = documents[0][:4]
    documents[3][:10] = documents[0][:10]
    documents[4][:] = documents[3][:5]
    return torch.cat(documents)[None]


@pytest.mark.parametrize("blocks", [None, 2, 192], ids=["flash", "small blocks", "one block"])
@pytest.mark.parametrize("kind", MODELS)
def test_shared_beginnings_equal_padded(kind, blocks, alike, caplog, monkeypatch):
    monkeypatch.setattr(packs, "SHORTEST", 3)
    if blocks:
        monkeypatch.setattr(attention, "supports_flash", lambda *_: False)
        monkeypatch.setattr(blockwise, "ROWS", blocks)
    reference, model = build(kind, "eager"), build(kind, PACKED)
    expected, found = padded_logits(reference, alike), shared_logits(model, alike)
    check_equal(reference, expected, model, found, alike, atol=1e-5)
    assert computes_no_full_mask(caplog)


def test_an_unknown_mask_shares_nothing(alike, monkeypatch):
    monkeypatch.setattr(packs, "SHORTEST", 3)
    monkeypatch.setattr(attention, "_matches_causal_mask", lambda *_: False)
    with pytest.raises(ModelError, match="model.share_prefixes=false"):
        shared_logits(build("llama", PACKED), alike)


@pytest.mark.parametrize("recomputes", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", MODELS)
def test_packed_equals_padded(kind, recomputes, ids, caplog):
    reference, model = build(kind, "eager"), build(kind, PACKED)
    if recomputes:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    expected, found = padded_logits(reference, ids), packed_logits(model, ids)
    check_equal(reference, expected, model, found, ids, atol=1e-6)
    assert computes_no_full_mask(caplog)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral"])
def test_bf16_is_as_near_to_fp32_as_the_padded_batch_is(kind, ids):
    exact = build(kind, "eager")
    wanted = gradients(exact, padded_logits(exact, ids), ids)

    def error(model, logits):
        found = gradients(model, logits, ids)
        return max(((found[name].float() - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted)

    padded, packed = (build(kind, name, torch.bfloat16) for name in ("eager", PACKED))
    assert error(packed, packed_logits(packed, ids)) < 1.5 * error(padded, padded_logits(padded, ids)) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_a_document_changes_no_bit_of_another(kind, dtype, ids):
    model = build(kind, PACKED, dtype)
    other = ids.clone()
    begin, end = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    other[0, begin:end] = other[0, begin:end].flip(0) % 60 + 3
    prefix, after = packed_logits(model, ids), packed_logits(model, other)
    assert not torch.equal(prefix[begin:end], after[begin:end])
    assert torch.equal(prefix[:begin], after[:begin]) and torch.equal(prefix[end:], after[end:])


def test_the_mask_of_a_pack_is_not_a_tensor(ids):
    seen = []
    model = build("llama", PACKED)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs["attention_mask"]), with_kwargs=True)
    packed_logits(model, ids)
    assert [[len(part) for part in mask.segments] for mask in seen] == [LENGTHS, LENGTHS]


def test_outside_a_pack_it_attends_as_sdpa_does(ids):
    ours, theirs = (build("mistral", name) for name in (PACKED, "sdpa"))
    torch.testing.assert_close(padded_logits(ours, ids), padded_logits(theirs, ids), rtol=0, atol=0)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=0)


def test_an_unknown_mask_is_computed_in_full_and_keeps_documents_apart(ids, caplog):
    model = build("llama", PACKED)
    original = model.model.forward

    def with_a_mask_of_its_own(**inputs):
        from transformers.models.llama import modeling_llama

        make = modeling_llama.create_causal_mask

        def make_unknown(position_ids, **given):  # every other token is seen from everywhere; nothing of packing
            return make(**given, or_mask_function=lambda batch, head, row, column: column % 2 == 0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modeling_llama, "create_causal_mask", make_unknown)
            return original(**inputs)

    model.model.forward = with_a_mask_of_its_own
    caplog.set_level(logging.WARNING)
    whole = packed_logits(model, ids)
    assert [record.message for record in caplog.records if "computed in full" in record.message]
    alone = [packed_logits(model, part[None], [len(part)]) for part in ids[0].split(LENGTHS)]
    assert not torch.allclose(whole[:11], packed_logits(build("llama", PACKED), ids)[:11])
    torch.testing.assert_close(whole[:11], alone[0], rtol=1e-4, atol=1e-5)


def test_models_with_attention_of_their_own_are_told_apart():
    kinds = "llama", "bloom", "falcon", "mamba2"
    assert [best_attention(AutoConfig.for_model(kind)) for kind in kinds] == [PACKED, "eager", "sdpa", "eager"]


def test_a_model_that_looks_into_its_mask_says_what_to_set(ids):
    model = build("llama", PACKED)
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, inputs: inputs["attention_mask"].shape, with_kwargs=True
    )
    with pytest.raises(ModelError, match="model.attn_implementation=sdpa"):
        packed_logits(model, ids)


@pytest.mark.parametrize("lies", ["by size", "by token", "values narrower"])
def test_attention_of_one_document_is_sdpas_however_its_tensors_lie(lies):
    query, key, value = (torch.randn(1, heads, 20, 8, requires_grad=True) for heads in (4, 2, 2))
    if lies == "by token":
        query, key, value = (whole.transpose(2, 3).contiguous().transpose(2, 3) for whole in (query, key, value))
    elif lies == "values narrower":
        value = value[..., :5]
    documents = attention.Documents(concatenate([20]).segments, None, "cpu")
    found, _ = attention.attend(torch.nn.Module(), query, key, value, documents)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    wanted, got = (
        torch.autograd.grad(whole.square().sum(), (query, key, value), retain_graph=True) for whole in (expected, found)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_shared_beginnings_longer_than_the_kernels_blocks(groups, monkeypatch):
    first = Segment(0, 600)
    second = Segment(600, 800, (first,))
    segments = [first, second, Segment(800, 950, (first, second)), Segment(950, 1100, (first,))]
    query, key, value = (torch.randn(1, heads, 1100, 5, requires_grad=True) for heads in (4, groups, groups))
    documents, upstream = attention.Documents(segments, None, "cpu"), torch.randn(1, 1100, 4, 5)

    def outcome():
        found, _ = attention.attend(torch.nn.Module(), query, key, value, documents)
        return found, *torch.autograd.grad(found, (query, key, value), upstream)

    calls, attend_flash = [], attention.attend_flash
    monkeypatch.setattr(attention, "attend_flash", lambda *given: calls.append(1) or attend_flash(*given))
    found = outcome()
    monkeypatch.setattr(attention, "supports_flash", lambda *_: False)
    torch.testing.assert_close(found, outcome(), rtol=1e-3, atol=1e-4)
    assert len(calls) == 1


def test_forty_beginnings_within_each_other():
    segments = []
    for number in range(40):
        segments.append(Segment(number * 16, number * 16 + 16, tuple(segments)))
    query = key = value = torch.randn(1, 2, 640, 8)
    found, _ = attention.attend(torch.nn.Module(), query, key, value, attention.Documents(segments, None, "cpu"))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_dropout_drops():
    query = torch.randn(1, 4, 300, 8)
    key = value = torch.randn(1, 2, 300, 8)
    documents = attention.Documents(concatenate([100, 200]).segments, None, "cpu")
    module = torch.nn.Module()
    kept, _ = attention.attend(module, query, key, value, documents)
    dropped, _ = attention.attend(module, query, key, value, documents, dropout=0.5)
    assert not torch.allclose(kept, dropped)
    torch.testing.assert_close(kept[:, 50:].mean(), dropped[:, 50:].mean(), rtol=0, atol=0.02)


@pytest.mark.parametrize("is_shared", [False, True], ids=["side by side", "shared"])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_the_gpus_kernel_gets_what_its_contract_asks_for(window, is_shared, alike, monkeypatch):
    """No GPU here: a slow stand-in that does what PyTorch documents of varlen_attn."""

    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and max_q == max_k == max(LENGTHS)
        assert len(query) == cu_q[-1] and len(key) == len(value) == cu_k[-1]
        rows, columns = torch.arange(len(query)), torch.arange(len(key))
        of_row, of_column = (torch.bucketize(at, cu[1:], right=True) for at, cu in ((rows, cu_q), (columns, cu_k)))
        back, ahead = window_size
        gap = (cu_q[1:][of_row] - rows)[:, None] - (cu_k[1:][of_column] - columns)[None]  # both count from the end
        seen = (of_row[:, None] == of_column[None]) & (-gap >= -ahead) & ((-gap <= back) | (back < 0))
        groups = query.shape[1] // key.shape[1] if enable_gqa else 1
        key, value = (whole.repeat_interleave(groups, 1) for whole in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)

    monkeypatch.setattr(packs, "SHORTEST", 3)
    shared = share_prefixes([part.numpy() for part in alike[0].split(LENGTHS)])
    segments = (shared if is_shared else concatenate(LENGTHS)).segments
    query, key, value = (torch.randn(1, heads, segments[-1].end, 8) for heads in (4, 2, 2))
    documents = attention.Documents(segments, window, "cpu")
    expected, _ = attention.attend(torch.nn.Module(), query, key, value, documents, scaling=0.3)
    monkeypatch.setattr(attention, "_supports_varlen", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    found, _ = attention.attend(torch.nn.Module(), query, key, value, documents, scaling=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
