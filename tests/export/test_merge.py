"""A merged model computes what the model with adapters computes, also where head and embeddings are tied."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from sft_recipe.engine.cpu.platform import use_cpu
from sft_recipe.errors import ModelError
from tests.support import tiny
from tests.support.plain import plain_loss
from tests.support.runs import metrics, run_here

RECORDS = [
    {"prompt": "Hello there, how are you?", "response": "I am fine, thank you."},
    {"prompt": "What is the capital of France?", "response": "Paris. " * 5},
]


@pytest.mark.parametrize("targets", ["[q_proj,v_proj]", "[lm_head]", "[embed_tokens]", "[q_proj,embed_tokens,lm_head]"])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_merged_model_has_the_validation_loss_of_the_trained_one(tmp_path, targets, is_tied):
    folder = tiny.build_model(tmp_path / "model", tie_word_embeddings=is_tied)
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    code = run_here(
        f"model.path={folder}", f"data.train_files={tmp_path}/data.json", f"data.val_files={tmp_path}/data.json",
        f"data.cache_dir={tmp_path}/cache", f"trainer.output_dir={tmp_path}/out", "trainer.device=cpu",
        "trainer.total_training_steps=3", "optim.lr=3e-2", "optim.lr_scheduler_type=constant",
        "optim.lr_warmup_steps_ratio=0", "fsdp.mixed_precision.param_dtype=fp32", "lora.enabled=true",
        "lora.merge=true", f"lora.target_modules={targets}",
    )  # fmt: skip
    assert code == 0
    checkpoint = tmp_path / "out/checkpoints/step_3"
    trained = metrics(tmp_path / "out")[-1]["val/loss"]
    assert plain_loss(checkpoint / "huggingface", RECORDS) == pytest.approx(trained, rel=1e-6)
    assert trained != pytest.approx(plain_loss(folder, RECORDS), rel=1e-3)  # the adapters have an effect
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), checkpoint / "lora_adapter")
    merged = AutoModelForCausalLM.from_pretrained(checkpoint / "huggingface")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)


def test_adapters_are_loaded_without_a_trace_in_other_threads(tmp_path, monkeypatch):
    """A run trains meanwhile: no random numbers are drawn, and modules are as they were, while peft builds layers."""
    use_cpu()
    from sft_recipe.export.merge import load_adapters

    folder = tiny.build_model(tmp_path / "model")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    base, register, seen = AutoModelForCausalLM.from_pretrained(folder), torch.nn.Module.register_parameter, []
    init = torch.nn.Linear.__init__

    def look(self, *args, **settings):
        init(self, *args, **settings)
        seen.append((torch.nn.Module.register_parameter is register, self.weight.device.type))

    monkeypatch.setattr(torch.nn.Linear, "__init__", look)
    before = torch.get_rng_state()
    loaded = load_adapters(base, tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), before) and set(seen) == {(True, "meta")}
    for name, weight in adapted.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


@pytest.mark.parametrize("wrong", [1.01, torch.nan])
def test_other_logits_after_a_merge_are_an_error(wrong):
    use_cpu()
    from sft_recipe.export.merge import require_same_logits

    require_same_logits(torch.ones(4, 8), torch.ones(4, 8) + 1e-6, "merging")
    with pytest.raises(ModelError, match="changed the model's logits"):
        require_same_logits(torch.ones(4, 8), torch.ones(4, 8).index_fill(1, torch.tensor([3]), wrong), "merging")
