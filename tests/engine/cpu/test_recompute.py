"""Norms and gated MLPs that save only their inputs, against the models' own."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from sft_recipe.engine.cpu import recompute
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
    monkeypatch.setattr(recompute, "BLOCK", request.param)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "mixtral", "smollm3", "gemma3_text"])
def test_loss_and_gradients_of_a_model_are_unchanged(kind):
    model, reference = build(kind), build(kind)
    recompute_norms_and_mlps(model)
    loss, gradients = losses_and_gradients(model)
    expected_loss, expected_gradients = losses_and_gradients(reference)
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["norm", "mlp"])
def test_bf16_error_is_that_of_the_models_own(kind):
    torch.manual_seed(0)
    own = (LlamaRMSNorm(32) if kind == "norm" else LlamaMLP(AutoConfig.for_model("llama", **SIZES))).bfloat16()
    changed, exact = copy.deepcopy(own), copy.deepcopy(own).double()
    recompute_norms_and_mlps(changed)
    x = torch.randn(300, 32).bfloat16()
    upstream = torch.randn_like(x)

    def gradients(module, dtype):
        leaf = x.to(dtype).requires_grad_()
        return torch.autograd.grad(module(leaf), [leaf, *module.parameters()], upstream.to(dtype))

    expected = gradients(exact, torch.float64)

    def errors(module):
        pairs = zip(gradients(module, torch.bfloat16), expected, strict=True)
        return [(actual.double() - right).norm() / right.norm() for actual, right in pairs]

    for changed_error, own_error in zip(errors(changed), errors(own), strict=True):
        assert changed_error < 1.02 * own_error < 0.02


def test_norms_and_products_save_only_their_inputs():
    def saved_bytes(model):
        sizes = {}
        own = {part.untyped_storage().data_ptr() for part in [*model.parameters(), *model.buffers()]}

        def record(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            model(torch.randn(1, 10, 32, dtype=torch.bfloat16, requires_grad=True))
        return sum(size for address, (size, _) in sizes.items() if address not in own)

    config = AutoConfig.for_model("llama", **SIZES)
    for module, before, after in (
        (LlamaRMSNorm(32), 10 * (32 * (4 + 2) + 4), 10 * (32 * 2 + 4)),  # fp32, rounded; input; and each row's scale
        (LlamaMLP(config), 10 * 2 * (32 + 4 * 48), 10 * 2 * (32 + 3 * 48)),  # input, gate, up, product; activation
    ):
        module = module.bfloat16()
        assert saved_bytes(module) == before
        recompute_norms_and_mlps(module)
        assert saved_bytes(module) == after


def test_modules_of_another_kind_are_not_changed():
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
            raise ValueError("unexpected input")

    config = AutoConfig.for_model("llama", **SIZES)
    mlps = [kind(config) for kind in (Scaled, Wide, Dropping, Strict)]
    for module in (Shifted(32), EpsilonOutside(32), *mlps, nn.LayerNorm(32), nn.RMSNorm(32)):
        recompute_norms_and_mlps(module)
        assert not is_changed(module)
    gemma = build("gemma3_text")
    recompute_norms_and_mlps(gemma)
    assert {type(part).__name__ for part in gemma.modules() if is_changed(part)} == {"Gemma3MLP"}


def test_all_modules_of_the_usual_kind_are_changed():
    model = build("qwen3")
    recompute_norms_and_mlps(model)
    changed = [name.split(".")[-1] for name, part in model.named_modules() if is_changed(part)]
    per_layer = ["input_layernorm", "mlp", "k_norm", "q_norm", "post_attention_layernorm"]
    assert sorted(changed) == sorted([*per_layer * 2, "norm"])


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "linear"])
def test_any_activation_is_supported(activation):
    model, reference = (build("llama", hidden_act=activation) for _ in range(2))
    recompute_norms_and_mlps(model)
    assert is_changed(model.model.layers[0].mlp)
    gradients, expected = losses_and_gradients(model)[1], losses_and_gradients(reference)[1]
    assert all(torch.allclose(gradients[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)


def test_frozen_weights_get_no_gradient():
    norm = LlamaRMSNorm(32)
    recompute_norms_and_mlps(norm)
    x, upstream = torch.randn(1, 10, 32, requires_grad=True), torch.randn(1, 10, 32)
    assert norm(x).grad_fn.apply(upstream, None)[1] is not None
    norm.requires_grad_(False)
    assert norm(x).grad_fn.apply(upstream, None)[1] is None


def test_a_norm_with_an_optional_gate_still_takes_it():
    norm, x, gate = MambaRMSNormGated(32), torch.randn(3, 32), torch.randn(3, 32)
    expected = norm(x, gate), norm(x)
    recompute_norms_and_mlps(norm)
    assert torch.equal(norm(x, gate), expected[0]) and torch.equal(norm(x, gate=gate), expected[0])
    assert torch.equal(norm(x), expected[1]) and not torch.equal(*expected)


def test_inputs_of_another_dtype_than_the_weight_use_the_models_own_forward():
    norm, x = LlamaRMSNorm(32), torch.randn(3, 32).bfloat16()
    expected = norm(x)
    recompute_norms_and_mlps(norm)
    assert norm(x).dtype == expected.dtype == torch.float32 and torch.equal(norm(x), expected)


def test_a_norm_is_recomputed_once_and_freed_by_its_backward():
    norm = LlamaRMSNorm(32)
    recompute_norms_and_mlps(norm)
    result = norm(torch.randn(3, 32, requires_grad=True))
    recipe = recompute.Recomputation.of(result)

    @torch.no_grad()  # as inside a backward
    def recomputed():
        return recipe.make(*recipe.sources)

    again = recomputed()
    assert torch.equal(again, result) and recomputed() is again
    result.sum().backward()
    assert recomputed() is not again
