"""Packed attention against a padded, masked batch of the same documents, which transformers computes in its own way."""

import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from sft_recipe.config.auto import PACKED_ATTENTION
from sft_recipe.engine.attention import packed, prefix_sharing
from sft_recipe.engine.attention.documents import DocumentMask, MaskUnsupported, PackedDocuments
from sft_recipe.engine.attention.packed import best_attention
from sft_recipe.engine.attention.prefix_sharing import Segment, concatenate, share_prefixes
from sft_recipe.engine.cpu import blockwise_attention

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
    packed._known_masks.clear()
    yield
    packed._known_masks.clear()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def shared_logits(model, ids):
    """The logits of the documents, one after the other, from a pack in which shared prefixes are computed once."""
    documents = ids[0].split(LENGTHS)
    pack = share_prefixes([document.numpy() for document in documents])
    assert any(segment.prefix for segment in pack.segments) and pack.segments[-1].end < ids.shape[1]
    rows = torch.from_numpy(pack.rows)
    tokens, positions = (torch.empty(pack.segments[-1].end, dtype=torch.long) for _ in range(2))
    tokens[rows] = ids[0]
    positions[rows] = torch.cat([torch.arange(length) for length in LENGTHS])
    inputs = dict(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
    return model(**inputs, attention_mask=PackedDocuments(pack.segments)).logits[0, rows]


def packed_logits(model, ids, lengths=tuple(LENGTHS)):
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = PackedDocuments(concatenate(lengths).segments)
    return model(input_ids=ids, attention_mask=documents, position_ids=positions, use_cache=False).logits[0]


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


def check_equal(reference, expected, model, actual, ids, atol):
    """Check the logits `actual` of `model` and their gradients against the `expected` ones of `reference`."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    expected_gradients, actual_gradients = gradients(reference, expected, ids), gradients(model, actual, ids)
    assert expected_gradients.keys() == actual_gradients.keys() and len(actual_gradients) > 10
    for name in expected_gradients:
        torch.testing.assert_close(actual_gradients[name], expected_gradients[name], rtol=1e-3, atol=atol, msg=name)


def computes_no_full_mask(caplog):
    return packed.__name__ not in [record.name for record in caplog.records]


@pytest.fixture(scope="module")
def ids_with_prefixes(ids):
    """Documents of the same lengths: two share 4 tokens, two share 10, and one is a prefix of another."""
    documents = [part.clone() for part in ids[0].split(LENGTHS)]
    documents[1][:4] = documents[0][:4]
    documents[3][:10] = documents[0][:10]
    documents[4][:] = documents[3][:5]
    return torch.cat(documents)[None]


@pytest.mark.parametrize("blocks", [None, 2, 192], ids=["sdpa", "small blocks", "one block"])
@pytest.mark.parametrize("kind", MODELS)
def test_shared_prefixes_give_the_result_of_a_padded_batch(kind, blocks, ids_with_prefixes, caplog, monkeypatch):
    monkeypatch.setattr(prefix_sharing, "SHORTEST", 3)
    if blocks:
        monkeypatch.setattr(packed, "_is_blockwise_faster", lambda *_: True)
        monkeypatch.setattr(blockwise_attention, "ROWS", blocks)
    reference, model = build(kind, "eager"), build(kind, PACKED_ATTENTION)
    expected, actual = padded_logits(reference, ids_with_prefixes), shared_logits(model, ids_with_prefixes)
    check_equal(reference, expected, model, actual, ids_with_prefixes, atol=1e-5)
    assert computes_no_full_mask(caplog)


def test_an_unknown_mask_prevents_prefix_sharing(ids_with_prefixes, monkeypatch):
    monkeypatch.setattr(prefix_sharing, "SHORTEST", 3)
    monkeypatch.setattr(packed, "_matches_causal_mask", lambda *_: False)
    with pytest.raises(MaskUnsupported, match="prefixes cannot be shared"):
        shared_logits(build("llama", PACKED_ATTENTION), ids_with_prefixes)


@pytest.mark.parametrize("recomputes", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", MODELS)
def test_packing_gives_the_result_of_a_padded_batch(kind, recomputes, ids, caplog):
    reference, model = build(kind, "eager"), build(kind, PACKED_ATTENTION)
    if recomputes:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    expected, actual = padded_logits(reference, ids), packed_logits(model, ids)
    check_equal(reference, expected, model, actual, ids, atol=1e-6)
    assert computes_no_full_mask(caplog)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral"])
def test_bf16_error_is_that_of_a_padded_batch(kind, ids):
    exact = build(kind, "eager")
    expected = gradients(exact, padded_logits(exact, ids), ids)

    def error(model, logits):
        actual = gradients(model, logits, ids)
        return max(((actual[name].float() - expected[name]).norm() / expected[name].norm()).item() for name in expected)

    of_padded, of_packed = (build(kind, name, torch.bfloat16) for name in ("eager", PACKED_ATTENTION))
    padded_error = error(of_padded, padded_logits(of_padded, ids))
    assert error(of_packed, packed_logits(of_packed, ids)) < 1.5 * padded_error < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_a_document_changes_no_bit_of_another(kind, dtype, ids):
    model = build(kind, PACKED_ATTENTION, dtype)
    other = ids.clone()
    begin, end = LENGTHS[0], LENGTHS[0] + LENGTHS[1]
    other[0, begin:end] = other[0, begin:end].flip(0) % 60 + 3
    before, after = packed_logits(model, ids), packed_logits(model, other)
    assert not torch.equal(before[begin:end], after[begin:end])
    assert torch.equal(before[:begin], after[:begin]) and torch.equal(before[end:], after[end:])


def test_layers_get_the_documents_as_their_mask(ids):
    masks = []
    model = build("llama", PACKED_ATTENTION)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, inputs: masks.append(inputs["attention_mask"]), with_kwargs=True
        )
    packed_logits(model, ids)
    assert [[len(segment) for segment in mask.segments] for mask in masks] == [LENGTHS, LENGTHS]


def test_without_packed_documents_it_attends_as_sdpa_does(ids):
    model, reference = (build("mistral", name) for name in (PACKED_ATTENTION, "sdpa"))
    torch.testing.assert_close(padded_logits(model, ids), padded_logits(reference, ids), rtol=0, atol=0)
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=0, atol=0)


def test_an_unknown_mask_is_computed_for_all_tokens_and_isolates_documents(ids, caplog):
    model = build("llama", PACKED_ATTENTION)
    original = model.model.forward

    def with_another_mask(**inputs):
        from transformers.models.llama import modeling_llama

        make = modeling_llama.create_causal_mask

        def make_unknown(**arguments):  # every other token is visible to all
            return make(**arguments, or_mask_function=lambda batch, head, row, column: column % 2 == 0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modeling_llama, "create_causal_mask", make_unknown)
            return original(**inputs)

    model.model.forward = with_another_mask
    caplog.set_level(logging.WARNING)
    together = packed_logits(model, ids)
    assert [record.message for record in caplog.records if "for all pairs of tokens" in record.message]
    alone = [packed_logits(model, part[None], [len(part)]) for part in ids[0].split(LENGTHS)]
    assert not torch.allclose(together[:11], packed_logits(build("llama", PACKED_ATTENTION), ids)[:11])
    torch.testing.assert_close(together[:11], alone[0], rtol=1e-4, atol=1e-5)


def test_best_attention_depends_on_what_the_model_supports():
    kinds = "llama", "bloom", "falcon", "mamba2"
    assert [best_attention(AutoConfig.for_model(kind)) for kind in kinds] == [
        PACKED_ATTENTION,
        "eager",
        "sdpa",
        "eager",
    ]


USES = {"shape": lambda mask: mask.shape, "==": lambda mask: mask == 1, "[0]": lambda mask: mask[0]}


@pytest.mark.parametrize("use", USES)
def test_a_layer_that_reads_its_mask_is_unsupported(use, ids):
    model = build("llama", PACKED_ATTENTION)
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, inputs: USES[use](inputs["attention_mask"]), with_kwargs=True
    )
    with pytest.raises(MaskUnsupported, match=f"uses {use!r} of its attention mask".replace("[", r"\[")):
        packed_logits(model, ids)


@pytest.mark.parametrize("is_blockwise", [False, True], ids=["sdpa", "blockwise"])
@pytest.mark.parametrize("layout", ["by size", "by token", "values narrower"])
def test_attention_of_one_document_equals_sdpa_in_any_layout(layout, is_blockwise, monkeypatch):
    monkeypatch.setattr(packed, "_is_blockwise_faster", lambda *_: is_blockwise)
    query, key, value = (torch.randn(1, heads, 20, 8, requires_grad=True) for heads in (4, 2, 2))
    if layout == "by token":
        query, key, value = (tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in (query, key, value))
    elif layout == "values narrower":
        value = value[..., :5]
    documents = DocumentMask(concatenate([20]).segments, None, "cpu")
    actual, _ = packed.attend(torch.nn.Module(), query, key, value, documents)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    expected_gradients, actual_gradients = (
        torch.autograd.grad(result.square().sum(), (query, key, value), retain_graph=True)
        for result in (expected, actual)
    )
    torch.testing.assert_close(actual_gradients, expected_gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sdpa_and_blockwise_attention_agree_on_prefixes_longer_than_a_block(groups, monkeypatch):
    first = Segment(0, 600)
    second = Segment(600, 800, (first,))
    segments = [first, second, Segment(800, 950, (first, second)), Segment(950, 1100, (first,))]
    query, key, value = (torch.randn(1, heads, 1100, 5, requires_grad=True) for heads in (4, groups, groups))
    documents, upstream = DocumentMask(segments, None, "cpu"), torch.randn(1, 1100, 4, 5)

    def outcome():
        result, _ = packed.attend(torch.nn.Module(), query, key, value, documents)
        return result, *torch.autograd.grad(result, (query, key, value), upstream)

    with_sdpa = outcome()
    monkeypatch.setattr(packed, "_is_blockwise_faster", lambda *_: True)
    torch.testing.assert_close(with_sdpa, outcome(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("is_blockwise", [False, True], ids=["sdpa", "blockwise"])
def test_forty_nested_prefixes(is_blockwise, monkeypatch):
    monkeypatch.setattr(packed, "_is_blockwise_faster", lambda *_: is_blockwise)
    segments = []
    for number in range(40):
        segments.append(Segment(number * 16, number * 16 + 16, tuple(segments)))
    query = key = value = torch.randn(1, 2, 640, 8)
    actual, _ = packed.attend(torch.nn.Module(), query, key, value, DocumentMask(segments, None, "cpu"))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_dropout_changes_the_result_and_keeps_its_mean():
    query = torch.randn(1, 4, 300, 8)
    key = value = torch.randn(1, 2, 300, 8)
    documents = DocumentMask(concatenate([100, 200]).segments, None, "cpu")
    module = torch.nn.Module()
    complete, _ = packed.attend(module, query, key, value, documents)
    dropped, _ = packed.attend(module, query, key, value, documents, dropout=0.5)
    assert not torch.allclose(complete, dropped)
    torch.testing.assert_close(complete[:, 50:].mean(), dropped[:, 50:].mean(), rtol=0, atol=0.02)


@pytest.mark.parametrize("is_shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_varlen_kernel_gets_the_arguments_of_its_contract(window, is_shared, ids_with_prefixes, monkeypatch):
    """Runs without a GPU: a slow replacement does what PyTorch documents for varlen_attn."""

    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and max_q == max_k == max(LENGTHS)
        assert len(query) == cu_q[-1] and len(key) == len(value) == cu_k[-1]
        rows, columns = torch.arange(len(query)), torch.arange(len(key))
        of_row, of_column = (torch.bucketize(at, cu[1:], right=True) for at, cu in ((rows, cu_q), (columns, cu_k)))
        back, ahead = window_size
        gap = (cu_q[1:][of_row] - rows)[:, None] - (cu_k[1:][of_column] - columns)[None]  # both count from the end
        visible = (of_row[:, None] == of_column[None]) & (-gap >= -ahead) & ((-gap <= back) | (back < 0))
        groups = query.shape[1] // key.shape[1] if enable_gqa else 1
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, float("-inf")).softmax(-1), value)

    monkeypatch.setattr(prefix_sharing, "SHORTEST", 3)
    shared = share_prefixes([part.numpy() for part in ids_with_prefixes[0].split(LENGTHS)])
    segments = (shared if is_shared else concatenate(LENGTHS)).segments
    query, key, value = (torch.randn(1, heads, segments[-1].end, 8) for heads in (4, 2, 2))
    documents = DocumentMask(segments, window, "cpu")
    expected, _ = packed.attend(torch.nn.Module(), query, key, value, documents, scaling=0.3)
    monkeypatch.setattr(packed, "_supports_varlen", lambda *_: True)
    monkeypatch.setattr(packed, "varlen_attn", varlen_attn)
    actual, _ = packed.attend(torch.nn.Module(), query, key, value, documents, scaling=0.3)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
