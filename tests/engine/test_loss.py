"""The loss against torch's own, and what it holds."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from sft_recipe.engine import loss
from sft_recipe.engine.loss import summed_cross_entropy

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip


def both(logits, targets, scale):
    """Loss and gradient, ours and those of torch in fp64."""
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = summed_cross_entropy(ours, targets) * scale
    expected = F.cross_entropy(exact, targets, reduction="sum") * scale
    found.backward()
    expected.backward()
    return found, ours.grad, expected.float(), exact.grad.float()


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
@pytest.mark.parametrize("chunk", [1, 300, 10**9], ids=["row by row", "three rows", "at once"])
def test_equals_torch_in_fp32(monkeypatch, chunk, tokens):
    monkeypatch.setitem(loss.CHUNK, "cpu", chunk)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, 100, generator=generator) * 20  # exp overflows, unless the largest is taken out
    logits[0, :50] += 200
    found, gradient, expected, exact = both(logits, torch.randint(100, (tokens,), generator=generator), 0.37)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)


def test_bf16_is_rounded_once():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 1000, generator=generator).bfloat16()
    found, gradient, expected, exact = both(logits, torch.randint(1000, (50,), generator=generator), 0.01)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), exact, rtol=2**-8, atol=1e-9)


def test_only_the_logits_are_kept():
    logits = torch.randn(50, 1000).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        summed_cross_entropy(logits, torch.zeros(50, dtype=torch.long))
    large = [saved for saved in kept if saved.numel() >= logits.numel()]
    assert [saved.data_ptr() for saved in large] == [logits.data_ptr()]


HEADS = {
    "tied": ("llama", dict(tie_word_embeddings=True)),
    "untied": ("llama", dict(tie_word_embeddings=False)),
    "soft cap": ("gemma2", dict(final_logit_softcapping=0.5, sliding_window=64)),
    "scaled down": ("granite", dict(logits_scaling=8.0)),
    "scaled up": ("cohere", dict(logit_scale=4.0)),
    "bias": ("phi", {}),
}


@pytest.mark.parametrize("recomputes", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_gives_the_loss_and_gradients_of_all_logits(head, recomputes):
    kind, settings = HEADS[head]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **settings), dtype=torch.float32)
    check_head(model, recomputes)


@pytest.mark.parametrize("on_head", [False, True], ids=["head without adapter", "head with adapter"])
def test_lora_gives_the_loss_and_gradients_of_all_logits(on_head):
    config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=False)
    modules = ["q_proj", "lm_head"] if on_head else ["q_proj"]
    lora = LoraConfig(r=4, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32), lora)
    gradients = check_head(model, recomputes=False)
    assert gradients and all("lora_" in name for name in gradients)  # none of a frozen weight


def check_head(model, recomputes):
    if recomputes:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(3, 64, (1, 30), generator=torch.Generator().manual_seed(1))
    kept = torch.tensor([3, 4, 5, 17, 28])
    found = summed_cross_entropy(model(input_ids=ids, logits_to_keep=kept).logits[0], ids[0, kept + 1])
    gradients = torch.autograd.grad(found, trainable(model).values())
    expected = F.cross_entropy(model(input_ids=ids).logits[0, kept], ids[0, kept + 1], reduction="sum")
    exact = torch.autograd.grad(expected, trainable(model).values())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, one, other in zip(trainable(model), gradients, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
    return dict(zip(trainable(model), gradients, strict=True))


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
