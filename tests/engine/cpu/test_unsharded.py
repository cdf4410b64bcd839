"""An unsharded model on one rank, against a plain copy of it in the dtype that it computes in."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, XGLMConfig, XGLMForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sft_recipe.engine.cpu.recompute import Recomputation, recompute_norms_and_mlps
from sft_recipe.engine.cpu.unsharded import GradAccumulator, UnshardedModel

IDS = torch.arange(3, 23)[None]
XGLM = XGLMConfig(
    vocab_size=64, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, dropout=0, attention_dropout=0
)


def build(**settings):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **settings))
    with torch.no_grad():  # biases are 0 at first
        for name, weight in model.named_parameters():
            weight.normal_() if name.endswith(".bias") else weight
    return model


def in_bf16(model):
    """A copy of the model with its weights rounded to bf16."""
    other = deepcopy(model)
    for weight in other.parameters():
        weight.data = weight.data.bfloat16()
    return other


def backward(model, shift=0):
    loss = model(input_ids=IDS + shift).logits.float().logsumexp(-1).sum()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("is_tied", [True, False])
def test_gradients_of_micro_batches_are_summed_in_fp32(is_tied):
    model = build(tie_word_embeddings=is_tied)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    sums: dict[str, torch.Tensor] = {}
    losses, rounded = [], in_bf16(model)
    for shift in range(3):
        plain = deepcopy(rounded)
        losses.append(backward(plain, shift))
        for name, weight in plain.named_parameters():
            sums[name] = sums.get(name, 0) + weight.grad.float()
    unsharded = UnshardedModel(model, torch.bfloat16)
    for step in range(2):
        model.zero_grad()
        with unsharded.computing():
            assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
            assert [backward(model, shift) for shift in range(3)] == losses
        for name, weight in model.named_parameters():
            assert weight.dtype == torch.float32 and torch.equal(weight, before[name])
            # A row of a tied weight has two gradients: here each is rounded, in the reference only their sum.
            close = dict(rtol=2**-7, atol=2**-7 * sums[name].abs().max()) if is_tied else dict(rtol=0, atol=0)
            torch.testing.assert_close(weight.grad, sums[name], **close, msg=f"{step} {name}")


def check_gradients(model, plain):
    for (name, weight), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        atol = 1e-6 * expected.grad.abs().max()
        torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-5, atol=atol, msg=name)


KINDS = {
    "tied": lambda: build(tie_word_embeddings=True, pad_token_id=5),  # the padding token is among the tokens
    "untied": lambda: build(tie_word_embeddings=False, pad_token_id=5),
    "biases": lambda: build(attention_bias=True, mlp_bias=True),
    "scaled embeddings": lambda: XGLMForCausalLM(XGLM),
}


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_and_embeddings_add_to_their_sums_directly(kind, monkeypatch):
    model = KINDS[kind]()
    plain = deepcopy(model)
    unsharded = UnshardedModel(model, torch.float32)
    copied = set()
    add = GradAccumulator._add
    monkeypatch.setattr(GradAccumulator, "_add", lambda self, part: copied.add(self.weight.dim()) or add(self, part))
    with unsharded.computing():
        for shift in range(3):
            assert torch.equal(backward(model, shift), backward(plain, shift))
    check_gradients(model, plain)
    assert copied == {1} or (kind == "scaled embeddings" and copied == {1, 2})


@pytest.mark.parametrize("is_checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("has_adapters", [False, True], ids=["full", "LoRA"])
def test_recomputed_inputs_of_linear_layers_are_bit_identical(has_adapters, dtype, is_checkpointing, monkeypatch):
    gradients = {}
    for recomputes in (True, False):
        model = (adapted() if has_adapters else build()).train()
        if is_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        recompute_norms_and_mlps(model)
        unsharded = UnshardedModel(model, dtype)
        if not recomputes:
            monkeypatch.setattr(Recomputation, "of", lambda tensor: None)
        with unsharded.computing():
            for shift in range(2):
                backward(model, shift)
        gradients[recomputes] = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert all(torch.equal(first, second) for first, second in zip(*gradients.values(), strict=True))


def adapted():
    """A model with LoRA adapters; B is not 0, so that A has a gradient."""
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=10, target_modules=targets, init_lora_weights=False)
    return get_peft_model(build(attention_bias=True), config)


def test_tensors_changed_in_place_are_not_recomputed():
    def gradient(changes_a_copy):
        torch.manual_seed(0)
        layers = nn.ModuleList([LlamaRMSNorm(8), nn.Linear(8, 3)])
        recompute_norms_and_mlps(layers)
        unsharded = UnshardedModel(layers, torch.float32)
        norm, linear = layers
        with unsharded.computing():
            hidden = norm(torch.randn(1, 5, 8, requires_grad=True))
            linear((hidden.clone() if changes_a_copy else hidden).mul_(2)).sum().backward()
        return linear.weight.grad

    assert torch.equal(gradient(False), gradient(True))


def test_copies_follow_changes_of_the_weights():
    model, plain = build(), build()
    copies = UnshardedModel(model, torch.bfloat16)
    with copies.computing():
        first = backward(model)
    with torch.no_grad():
        for weight in [*model.parameters(), *plain.parameters()]:
            weight.mul_(1.5)
    with copies.computing():
        second = backward(model)
    assert second == backward(in_bf16(plain)) != first


def test_tied_weights_share_one_copy():
    model = build(tie_word_embeddings=True)
    copies = UnshardedModel(model, torch.bfloat16)
    with copies.computing():
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(copies.copies) == len(list(model.parameters()))


def test_frozen_weights_have_copies_and_no_gradients():
    model = build()
    model.model.layers.requires_grad_(False)
    expected = in_bf16(model)
    unsharded = UnshardedModel(model, torch.bfloat16)
    with unsharded.computing():
        assert backward(model) == backward(expected)
    assert all(weight.grad is None for weight in model.model.layers.parameters())


def test_gradients_of_bf16_weights_are_summed_in_fp32_and_rounded_once():
    model, plain = in_bf16(build()), in_bf16(build())
    unsharded = UnshardedModel(model, torch.bfloat16)
    sums: dict[str, torch.Tensor] = {}
    for shift in range(8):
        other = deepcopy(plain)
        backward(other, shift)
        for name, weight in other.named_parameters():
            sums[name] = sums.get(name, 0) + weight.grad.float()
    with unsharded.computing():
        for shift in range(8):
            backward(model, shift)
    assert all(torch.equal(weight.grad, sums[name].bfloat16()) for name, weight in model.named_parameters())


def test_a_failed_step_leaves_no_gradients_for_the_next():
    model, other = build(), build()
    unsharded = UnshardedModel(model, torch.float32)
    with pytest.raises(ZeroDivisionError), unsharded.computing():
        backward(model)
        raise ZeroDivisionError
    for each, context in ((model, unsharded.computing()), (other, nullcontext())):
        with context:
            backward(each, 2)
    check_gradients(model, other)


def test_inputs_of_layers_are_cast_to_the_compute_dtype():
    """XGLM adds positions in fp32."""
    model = XGLMForCausalLM(XGLM)
    unsharded = UnshardedModel(model, torch.bfloat16, model._no_split_modules)
    with unsharded.computing():
        backward(model)
    assert all(weight.grad.any() for name, weight in model.named_parameters() if "fc1.weight" in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_keep_their_buffers_from_step_to_step(dtype):
    model, plain = build(), build()
    unsharded = UnshardedModel(model, dtype)
    addresses = []
    for _ in range(2):
        for each in (model, plain):
            each.zero_grad()
        with unsharded.computing():
            for shift in range(2):
                backward(model, shift)
        for shift in range(2):
            backward(plain, shift)
        addresses.append([weight.grad.data_ptr() for weight in model.parameters()])
        if dtype == torch.float32:
            assert not unsharded.copies
            check_gradients(model, plain)
    assert addresses[0] == addresses[1]


def test_an_error_restores_the_weights():
    model = build()
    before = list(model.parameters())
    with pytest.raises(ZeroDivisionError), UnshardedModel(model, torch.bfloat16).computing():
        raise ZeroDivisionError
    assert all(weight is same for weight, same in zip(before, model.parameters(), strict=True))
