"""Norms and gated MLPs that keep their inputs only, against the models' own."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from sft_recipe.engine.cpu import recompute as elementwise
from sft_recipe.engine.cpu.recompute import recompute_norms_and_mlps

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip


def build(kind, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, part in model.named_parameters():
            if "norm" in name:
                part.uniform_(0.5, 2.0)
    return model


def is_changed(module):
    return "forward" in vars(module)


def losses_and_gradients(model):
    ids = torch.randint(3, 64, (1, 50), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss, {name: part.grad for name, part in model.named_parameters() if part.requires_grad}


@pytest.fixture(params=[64, 2**18], ids=["a few rows", "all rows"], autouse=True)
def block(request, monkeypatch):
    monkeypatch.setattr(elementwise, "BLOCK", request.param)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "mixtral", "smollm3", "gemma3_text"])
def test_a_models_loss_and_gradients_stay(kind):
    model, reference = build(kind), build(kind)
    recompute_norms_and_mlps(model)
    loss, gradients = losses_and_gradients(model)
    expected, wanted = losses_and_gradients(reference)
    assert torch.equal(loss, expected)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["norm", "mlp"])
def test_bf16_is_as_near_to_the_truth_as_the_models_own(kind):
    torch.manual_seed(0)
    own = (LlamaRMSNorm(32) if kind == "norm" else LlamaMLP(AutoConfig.for_model("llama", **SIZES))).bfloat16()
    ours, exact = copy.deepcopy(own), copy.deepcopy(own).double()
    recompute_norms_and_mlps(ours)
    x = torch.randn(300, 32).bfloat16()
    upstream = torch.randn_like(x)

    def gradients(module, dtype):
        leaf = x.to(dtype).requires_grad_()
        return torch.autograd.grad(module(leaf), [leaf, *module.parameters()], upstream.to(dtype))

    wanted = gradients(exact, torch.float64)

    def errors(found):
        return [(part.double() - right).norm() / right.norm() for part, right in zip(found, wanted, strict=True)]

    for of_ours, of_own in zip(
        errors(gradients(ours, torch.bfloat16)), errors(gradients(own, torch.bfloat16)), strict=True
    ):
        assert of_ours < 1.02 * of_own < 0.02


def test_norms_and_products_keep_their_inputs_only():
    def kept(model):
        sizes = {}
        own = {part.untyped_storage().data_ptr() for part in [*model.parameters(), *model.buffers()]}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.randn(1, 10, 32, dtype=torch.bfloat16, requires_grad=True))
        return sum(size for address, (size, _) in sizes.items() if address not in own)

    config = AutoConfig.for_model("llama", **SIZES)
    for module, prefix, after in (
        (LlamaRMSNorm(32), 10 * (32 * (4 + 2) + 4), 10 * (32 * 2 + 4)),  # fp32, rounded; input; and each row's scale
        (LlamaMLP(config), 10 * 2 * (32 + 4 * 48), 10 * 2 * (32 + 3 * 48)),  # input, gate, up, product; activation
    ):
        module = module.bfloat16()
        assert kept(module) == prefix
        recompute_norms_and_mlps(module)
        assert kept(module) == after


def test_what_is_of_another_kind_stays_as_it_is():
    class Shifted(LlamaRMSNorm):
        def forward(self, hidden_states):
            return LlamaRMSNorm.forward(self, hidden_states) + 1e-3

    class EpsilonOutside(LlamaRMSNorm):
        def forward(self, hidden_states):
            wide = hidden_states.float()
            root = wide.pow(2).mean(-1, keepdim=True).sqrt()
            return self.weight * (wide / (root + self.variance_epsilon)).to(hidden_states.dtype)

    class Scaled(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 1.01)

    class Wide(LlamaMLP):
        def forward(self, x):
            return self.down_proj((self.act_fn(self.gate_proj(x).float()) * self.up_proj(x)).to(x.dtype))

    class Dropping(LlamaMLP):
        def forward(self, x):
            return nn.functional.dropout(LlamaMLP.forward(self, x), 0.1)

    class Strict(LlamaMLP):
        def forward(self, x):
            raise ValueError("not a batch of mine")

    config = AutoConfig.for_model("llama", **SIZES)
    mlps = [kind(config) for kind in (Scaled, Wide, Dropping, Strict)]
    for module in (Shifted(32), EpsilonOutside(32), *mlps, nn.LayerNorm(32), nn.RMSNorm(32)):
        recompute_norms_and_mlps(module)
        assert not is_changed(module)
    gemma = build("gemma3_text")
    recompute_norms_and_mlps(gemma)
    assert {type(part).__name__ for part in gemma.modules() if is_changed(part)} == {"Gemma3MLP"}


def test_of_the_usual_kind_all_are_changed():
    model = build("qwen3")
    recompute_norms_and_mlps(model)
    changed = [name.split(".")[-1] for name, part in model.named_modules() if is_changed(part)]
    per_layer = ["input_layernorm", "mlp", "k_norm", "q_norm", "post_attention_layernorm"]
    assert sorted(changed) == sorted([*per_layer * 2, "norm"])


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "linear"])
def test_any_activation(activation):
    model, reference = (build("llama", hidden_act=activation) for _ in range(2))
    recompute_norms_and_mlps(model)
    assert is_changed(model.model.layers[0].mlp)
    found, wanted = losses_and_gradients(model)[1], losses_and_gradients(reference)[1]
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6) for name in wanted)


def test_of_frozen_weights_no_gradient_is_made():
    norm = LlamaRMSNorm(32)
    recompute_norms_and_mlps(norm)
    x, upstream = torch.randn(1, 10, 32, requires_grad=True), torch.randn(1, 10, 32)
    assert norm(x).grad_fn.apply(upstream, None)[1] is not None
    norm.requires_grad_(False)
    assert norm(x).grad_fn.apply(upstream, None)[1] is None


def test_a_norm_that_may_be_given_a_gate_still_takes_it():
    norm, x, gate = MambaRMSNormGated(32), torch.randn(3, 32), torch.randn(3, 32)
    wanted = norm(x, gate), norm(x)
    recompute_norms_and_mlps(norm)
    assert torch.equal(norm(x, gate), wanted[0]) and torch.equal(norm(x, gate=gate), wanted[0])
    assert torch.equal(norm(x), wanted[1]) and not torch.equal(*wanted)


def test_an_input_of_another_width_than_the_weight_is_left_to_the_model():
    norm, x = LlamaRMSNorm(32), torch.randn(3, 32).bfloat16()
    wanted = norm(x)
    recompute_norms_and_mlps(norm)
    assert norm(x).dtype == wanted.dtype == torch.float32 and torch.equal(norm(x), wanted)


def test_what_a_norm_gives_is_made_again_once_and_forgotten_with_its_backward():
    norm = LlamaRMSNorm(32)
    recompute_norms_and_mlps(norm)
    result = norm(torch.randn(3, 32, requires_grad=True))
    recipe = elementwise.Recomputation.of(result)

    @torch.no_grad()  # as inside a backward
    def made():
        return recipe.make(*recipe.sources)

    again = made()
    assert torch.equal(again, result) and made() is again
    result.sum().backward()
    assert made() is not again
