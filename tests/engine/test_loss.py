"""The loss against torch's own, and what it holds."""

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
SCALE = torch.tensor(0.37)


def build(kind="llama", dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def inputs(model, tokens=30):
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([3, 4, 4, 5, 17, 28])  # a position that counts twice


@pytest.mark.parametrize("part", [1, 200, 10**9], ids=["row by row", "three rows", "at once"])
@pytest.mark.parametrize("exact", [1, 100, 10**9], ids=["one in fp32", "two in fp32", "all in fp32"])
def test_parts_do_not_matter(monkeypatch, part, exact):
    monkeypatch.setitem(loss.LOGITS_CHUNK, "cpu", part)
    monkeypatch.setitem(loss.SOFTMAX_CHUNK, "cpu", exact)
    check_head(build(), recomputes=False)


def test_bf16_is_as_near_to_fp32_as_all_logits_are():
    wanted = expected_loss(build())[1]

    def error(gradients):
        return max(((gradients[name].float() - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted)

    assert error(found_loss(build(dtype=torch.bfloat16))[1]) < 1.2 * error(
        expected_loss(build(dtype=torch.bfloat16))[1]
    )


def test_nothing_of_the_size_of_the_logits_is_kept(monkeypatch):
    monkeypatch.setitem(loss.LOGITS_CHUNK, "cpu", 10 * 64)
    model = build(vocab_size=4096)
    assert patch_chunked_cross_entropy(model)
    ids = torch.randint(3, 64, (1, 64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        model(input_ids=ids, positions=torch.arange(63), targets=ids[0, 1:], scale=SCALE)
    weight = model.lm_head.weight.numel()
    assert {saved.numel() for saved in kept if saved.numel() >= 64 * 64 * 16} == {weight}


def test_no_supervised_token_is_no_loss():
    model = build()
    assert patch_chunked_cross_entropy(model)
    none = torch.empty(0, dtype=torch.long)
    found = model(input_ids=inputs(model)[0], positions=none, targets=none, scale=SCALE)
    found.backward()
    assert found == 0 and all(not parameter.grad.any() for parameter in model.parameters())


def test_weights_may_be_views_of_another_tensor():
    """As FSDP1 puts them in a module's place while it runs."""
    model, reference = build(tie_word_embeddings=False), build(tie_word_embeddings=False)
    assert patch_chunked_cross_entropy(model)
    flat = torch.nn.Parameter(model.lm_head.weight.detach().flatten().clone())
    del model.lm_head.weight
    model.lm_head.weight = flat.view(64, 32)
    ids, positions = inputs(model)
    model(input_ids=ids, positions=positions, targets=ids[0, positions + 1], scale=SCALE).backward()
    wanted = expected_loss(reference)[1]["lm_head.weight"]
    torch.testing.assert_close(flat.grad.view(64, 32), wanted, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_whole_is_not_silently_left_untrained():
    model = build(tie_word_embeddings=False)
    assert patch_chunked_cross_entropy(model) == [model.lm_head.weight]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flatten()[:100])  # as a shard
    ids, positions = inputs(model)
    with pytest.raises(ModelError, match="lm_head.weight is sharded"):
        model(input_ids=ids, positions=positions, targets=ids[0, positions + 1], scale=SCALE)


def test_a_weight_that_the_loss_does_not_reach_is_told():
    """As of FSDP1, which computes with a view of another tensor."""
    model = build(tie_word_embeddings=False)
    assert patch_chunked_cross_entropy(model)
    weight = model.lm_head.weight
    model.lm_head.forward = lambda hidden: hidden @ weight.detach().T.clone().requires_grad_()
    ids, positions = inputs(model)
    with pytest.raises(ModelError, match="does not reach a weight of the head"):
        model(input_ids=ids, positions=positions, targets=ids[0, positions + 1], scale=SCALE)


def test_a_loss_that_was_changed_after_its_gradients_were_made_is_told():
    model = build()
    assert patch_chunked_cross_entropy(model)
    ids, positions = inputs(model)
    with pytest.raises(RuntimeError, match="changed after its gradients were made"):
        (2 * model(input_ids=ids, positions=positions, targets=ids[0, positions + 1], scale=SCALE)).backward()


def test_a_weight_beside_the_head_that_no_logit_uses_is_no_matter():
    model = build()
    model.other = torch.nn.Linear(3, 3)
    assert patch_chunked_cross_entropy(model)
    ids, positions = inputs(model)
    model(input_ids=ids, positions=positions, targets=ids[0, positions + 1], scale=SCALE).backward()
    assert model.other.weight.grad is None and model.lm_head.weight.grad.any()


def test_a_model_without_a_body_is_left_alone():
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
def test_every_head_gives_the_loss_and_gradients_of_all_logits(head, recomputes):
    kind, settings = HEADS[head]
    check_head(build(kind, **settings), recomputes)


def test_logits_that_their_own_backward_needs_are_not_written_over():
    """As of a tanh, which remembers what it gave."""
    model = build(tie_word_embeddings=False)
    model.lm_head.register_forward_hook(lambda module, given, logits: logits.tanh())
    check_head(model, recomputes=False)


@pytest.mark.parametrize("on_head", [False, True], ids=["head without adapter", "head with adapter"])
def test_lora_gives_the_loss_and_gradients_of_all_logits(on_head):
    modules = ["q_proj", "lm_head"] if on_head else ["q_proj"]
    lora = LoraConfig(r=4, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(build(tie_word_embeddings=False), lora)
    gradients = check_head(model, recomputes=False)
    assert gradients and all("lora_" in name for name in gradients)  # none of a frozen weight


def test_a_head_that_is_trained_beside_adapters():
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    gradients = check_head(get_peft_model(build(tie_word_embeddings=False), lora), recomputes=False)
    assert any("lm_head" in name for name in gradients)


def test_evaluation_needs_no_gradients():
    model = build()
    expected = expected_loss(model)[0]
    assert patch_chunked_cross_entropy(model)
    ids, positions = inputs(model)
    with torch.no_grad():
        found = model(input_ids=ids, positions=positions, targets=ids[0, positions + 1], scale=SCALE)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)


def check_head(model, recomputes):
    if recomputes:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected, exact = expected_loss(model)
    found, gradients = found_loss(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == exact.keys()
    for name in exact:
        torch.testing.assert_close(gradients[name], exact[name], rtol=1e-4, atol=1e-5, msg=name)
    return gradients


def expected_loss(model):
    """With the logits of all tokens, and torch's cross-entropy in fp64."""
    ids, positions = inputs(model)
    logits = model(input_ids=ids).logits[0, positions]
    expected = SCALE * F.cross_entropy(logits.double(), ids[0, positions + 1], reduction="sum")
    return expected.float(), gradients_of(expected, model)


def found_loss(model):
    assert patch_chunked_cross_entropy(model.get_base_model() if isinstance(model, PeftModel) else model)
    ids, positions = inputs(model)
    found = model(input_ids=ids, positions=positions, targets=ids[0, positions + 1], scale=SCALE)
    assert found.dtype == torch.float32
    return found, gradients_of(found, model)


def gradients_of(loss, model):
    found = torch.autograd.grad(loss, trainable(model).values())
    return dict(zip(trainable(model), found, strict=True))


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
