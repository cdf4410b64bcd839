"""The chunked loss against torch's own, and what it keeps in memory."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from sft_recipe.engine import loss
from sft_recipe.engine.loss import patch_chunked_cross_entropy
from sft_recipe.errors import ModelError

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
TOKENS = torch.tensor(465)


def build(kind="llama", dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def inputs(model, tokens=30):
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([3, 4, 4, 5, 17, 28])  # a position may appear twice


@pytest.mark.parametrize("part", [1, 200, 10**9], ids=["row by row", "three rows", "at once"])
@pytest.mark.parametrize("exact", [1, 100, 10**9], ids=["one in fp32", "two in fp32", "all in fp32"])
def test_chunk_sizes_do_not_change_the_loss(monkeypatch, part, exact):
    monkeypatch.setitem(loss.LOGITS_CHUNK, "cpu", part)
    monkeypatch.setitem(loss.SOFTMAX_CHUNK, "cpu", exact)
    check_head(build(), recomputes=False)


def test_bf16_error_is_that_of_computing_all_logits():
    expected = expected_loss(build())[1]

    def error(gradients):
        differences = {name: (gradients[name].float() - expected[name]).norm() for name in expected}
        return max((differences[name] / expected[name].norm()).item() for name in expected)

    of_all_logits = error(expected_loss(build(dtype=torch.bfloat16))[1])
    assert error(chunked_loss(build(dtype=torch.bfloat16))[1]) < 1.2 * of_all_logits


def test_no_tensor_of_the_size_of_the_logits_is_kept(monkeypatch):
    monkeypatch.setitem(loss.LOGITS_CHUNK, "cpu", 10 * 64)
    model = build(vocab_size=4096)
    assert patch_chunked_cross_entropy(model)
    ids = torch.randint(3, 64, (1, 64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model(input_ids=ids, positions=torch.arange(63), targets=ids[0, 1:], tokens=TOKENS, ranks=2)
    weight = model.lm_head.weight.numel()
    assert {tensor.numel() for tensor in saved if tensor.numel() >= 64 * 64 * 16} == {weight}


def test_loss_without_supervised_tokens_is_zero():
    model = build()
    assert patch_chunked_cross_entropy(model)
    none = torch.empty(0, dtype=torch.long)
    result, _ = model(input_ids=inputs(model)[0], positions=none, targets=none, tokens=TOKENS, ranks=2)
    result.backward()
    assert result == 0 and all(not parameter.grad.any() for parameter in model.parameters())


def test_weights_may_be_views_of_another_tensor():
    """FSDP1 replaces a module's weights by such views while it runs."""
    model, reference = build(tie_word_embeddings=False), build(tie_word_embeddings=False)
    assert patch_chunked_cross_entropy(model)
    flat = torch.nn.Parameter(model.lm_head.weight.detach().flatten().clone())
    del model.lm_head.weight
    model.lm_head.weight = flat.view(64, 32)
    ids, positions = inputs(model)
    model(input_ids=ids, positions=positions, targets=ids[0, positions + 1], tokens=TOKENS, ranks=2)[0].backward()
    expected = expected_loss(reference)[1]["lm_head.weight"]
    torch.testing.assert_close(flat.grad.view(64, 32), expected, rtol=1e-4, atol=1e-5)


def test_a_sharded_head_is_refused():
    model = build(tie_word_embeddings=False)
    assert patch_chunked_cross_entropy(model) == [model.lm_head.weight]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flatten()[:100])  # as a shard
    ids, positions = inputs(model)
    with pytest.raises(ModelError, match="lm_head.weight is sharded"):
        model(input_ids=ids, positions=positions, targets=ids[0, positions + 1], tokens=TOKENS, ranks=2)


def test_a_weight_that_the_loss_does_not_reach_is_refused():
    """FSDP1, for example, computes with a view of another tensor."""
    model = build(tie_word_embeddings=False)
    assert patch_chunked_cross_entropy(model)
    weight = model.lm_head.weight
    model.lm_head.forward = lambda hidden: hidden @ weight.detach().T.clone().requires_grad_()
    ids, positions = inputs(model)
    with pytest.raises(ModelError, match="does not reach a weight of the head"):
        model(input_ids=ids, positions=positions, targets=ids[0, positions + 1], tokens=TOKENS, ranks=2)


def test_backward_of_a_changed_loss_is_refused():
    model = build()
    assert patch_chunked_cross_entropy(model)
    ids, positions = inputs(model)
    with pytest.raises(RuntimeError, match="changed after its gradients were computed"):
        doubled = 2 * model(input_ids=ids, positions=positions, targets=ids[0, positions + 1], tokens=TOKENS)[0]
        doubled.backward()


def test_weights_that_no_logit_uses_get_no_gradient():
    model = build()
    model.other = torch.nn.Linear(3, 3)
    assert patch_chunked_cross_entropy(model)
    ids, positions = inputs(model)
    model(input_ids=ids, positions=positions, targets=ids[0, positions + 1], tokens=TOKENS, ranks=2)[0].backward()
    assert model.other.weight.grad is None and model.lm_head.weight.grad.any()


def test_a_model_without_a_body_is_not_changed():
    model = build()
    model.base_model_prefix = "nowhere"
    before = model.forward
    assert not patch_chunked_cross_entropy(model) and model.forward == before


HEADS = {
    "tied": ("llama", dict(tie_word_embeddings=True)),
    "untied": ("llama", dict(tie_word_embeddings=False)),
    "soft cap": ("gemma2", dict(final_logit_softcapping=0.5, sliding_window=64)),
    "scaled down": ("granite", dict(logits_scaling=8.0)),
    "scaled up": ("cohere", dict(logit_scale=4.0)),
    "bias": ("phi", {}),
    "experts": ("mixtral", dict(num_local_experts=4)),
    "experts and sinks": ("gpt_oss", dict(num_local_experts=4, head_dim=8)),
}


@pytest.mark.parametrize("recomputes", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("head", HEADS)
def test_each_kind_of_head_gives_the_loss_and_gradients_of_all_logits(head, recomputes):
    kind, settings = HEADS[head]
    check_head(build(kind, **settings), recomputes)


def test_logits_that_their_own_backward_needs_are_not_overwritten():
    """tanh, for example, saves its output."""
    model = build(tie_word_embeddings=False)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.tanh())
    check_head(model, recomputes=False)


@pytest.mark.parametrize("on_head", [False, True], ids=["head without adapter", "head with adapter"])
def test_lora_gives_the_loss_and_gradients_of_all_logits(on_head):
    modules = ["q_proj", "lm_head"] if on_head else ["q_proj"]
    lora = LoraConfig(r=4, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(build(tie_word_embeddings=False), lora)
    gradients = check_head(model, recomputes=False)
    assert gradients and all("lora_" in name for name in gradients)  # none of a frozen weight


def test_a_head_can_be_trained_together_with_adapters():
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    gradients = check_head(get_peft_model(build(tie_word_embeddings=False), lora), recomputes=False)
    assert any("lm_head" in name for name in gradients)


def test_evaluation_computes_the_loss_without_gradients():
    model = build()
    expected = expected_loss(model)[0]
    assert patch_chunked_cross_entropy(model)
    ids, positions = inputs(model)
    with torch.no_grad():
        result, _ = model(input_ids=ids, positions=positions, targets=ids[0, positions + 1], tokens=TOKENS, ranks=2)
    torch.testing.assert_close(result, expected.detach(), rtol=1e-5, atol=1e-5)


def check_head(model, recomputes):
    if recomputes:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected, expected_gradients = expected_loss(model)
    result, gradients = chunked_loss(model)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name in expected_gradients:
        torch.testing.assert_close(gradients[name], expected_gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    return gradients


def expected_loss(model):
    """The loss from the logits of all tokens, by torch's cross-entropy in fp64, and its gradients."""
    ids, positions = inputs(model)
    logits = model(input_ids=ids).logits[0, positions]
    expected = 2 / TOKENS * F.cross_entropy(logits.double(), ids[0, positions + 1], reduction="sum")
    return expected.float(), gradients_of(expected, model)


def chunked_loss(model):
    assert patch_chunked_cross_entropy(model.get_base_model() if isinstance(model, PeftModel) else model)
    ids, positions = inputs(model)
    result, _ = model(input_ids=ids, positions=positions, targets=ids[0, positions + 1], tokens=TOKENS, ranks=2)
    assert result.dtype == torch.float32
    return result, gradients_of(result, model)


def gradients_of(loss, model):
    gradients = torch.autograd.grad(loss, trainable(model).values())
    return dict(zip(trainable(model), gradients, strict=True))


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_targets_with_the_largest_logit_are_counted():
    model = build()
    ids, positions = inputs(model)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, positions]
        targets = logits.argmax(-1)
        targets[:2] = (targets[:2] + 1) % 64
        assert patch_chunked_cross_entropy(model)
        _, correct = model(
            input_ids=ids, positions=positions, targets=targets, tokens=TOKENS, ranks=2, counts_correct=True
        )
    assert int(correct) == len(targets) - 2
