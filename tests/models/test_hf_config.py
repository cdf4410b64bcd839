"""`model.override_config` changes what it names, or is an error; and models that cannot be trained are named."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from sft_recipe.config.schema import ModelConfig
from sft_recipe.errors import ConfigError, ModelError
from sft_recipe.models.hf_config import load_hf_config
from sft_recipe.models.resolve import ResolvedModel
from tests.support import tiny
from tests.support.plain import plain_loss
from tests.support.runs import metrics, run_here

YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.fixture
def folder(tmp_path):
    return tiny.build_model(tmp_path / "model", rope_parameters={"rope_type": "default", "rope_theta": 30000.0})


def read(folder, **overrides):
    return load_hf_config(ModelConfig(path=str(folder), override_config=overrides), ResolvedModel(folder, "tiny"))


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ({"rope_theta": 50}, {"rope_type": "default", "rope_theta": 50}),
        ({"rope_parameters": {"rope_theta": 50.0}}, {"rope_type": "default", "rope_theta": 50.0}),
        (
            {"rope_parameters": YARN},
            {**YARN, "rope_theta": 30000.0, "original_max_position_embeddings": 2048},
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 9.0, "max_position_embeddings": 8192},
            {**YARN, "rope_theta": 9.0, "original_max_position_embeddings": 2048},
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 30000.0},
        ),
    ],
)
def test_rope_settings_arrive_in_all_spellings(folder, overrides, expected):
    assert read(folder, **overrides).rope_parameters == expected


def test_rope_scaling_can_be_removed(tmp_path):
    folder = tiny.build_model(tmp_path / "model", rope_parameters={**YARN, "rope_theta": 7.0})
    assert read(folder, rope_scaling=None).rope_parameters == {"rope_type": "default", "rope_theta": 7.0}


def test_other_values_arrive(folder):
    config = read(folder, attention_dropout=0.25, tie_word_embeddings=False, num_hidden_layers=1)
    assert (config.attention_dropout, config.tie_word_embeddings, config.num_hidden_layers) == (0.25, False, 1)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"rope_thta": 5}, "LlamaConfig has no rope_thta; did you mean rope_theta"),
        ({"attention_dropuot": 0.1}, "did you mean attention_dropout"),
        ({"temperature": 0.1}, "LlamaConfig has no temperature"),
        ({"model_type": "qwen2"}, "model_type belongs to the model's weights"),
        ({"num_hidden_layers": "many"}, "LlamaConfig says"),
        ({"rope_scaling": {"rope_type": "none_such", "factor": 2.0}}, "no rope_type none_such; there are default, "),
    ],
)
def test_values_that_cannot_arrive_are_errors(folder, overrides, message):
    with pytest.raises(ConfigError, match=message):
        read(folder, **overrides)


def test_messages_hold_no_secret(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    with pytest.raises(ConfigError) as caught:
        read(folder, num_hidden_layers="hf_verysecret")
    assert "verysecret" not in str(caught.value) and "HF_TOKEN" in str(caught.value)


def test_a_theta_for_several_kinds_of_layers_needs_their_names(tmp_path):
    config = Gemma3TextConfig(architectures=["Gemma3ForCausalLM"])
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="rope_theta"):
        read(tmp_path, rope_theta=50)
    rope = {kind: {**values, "rope_theta": 50.0} for kind, values in config.rope_parameters.items()}
    assert read(tmp_path, rope_parameters=rope).rope_parameters == rope


@pytest.mark.parametrize("overrides", ["{rope_theta: 50}", "{rope_scaling: {rope_type: yarn, factor: 4.0}}"])
def test_an_overridden_model_trains_and_loads_back_with_the_same_loss(tmp_path, folder, overrides):
    """A theta and a context extension change the loss, are saved, and the saved model computes the trained one's."""
    records = [{"prompt": "What is the capital of France?", "response": "Paris, on the Seine. " * 9}] * 2
    (tmp_path / "data.json").write_text(json.dumps(records))
    common = [
        f"model.path={folder}", f"data.train_files={tmp_path}/data.json", f"data.val_files={tmp_path}/data.json",
        f"data.cache_dir={tmp_path}/cache", "trainer.device=cpu", "trainer.total_training_steps=1",
        "fsdp.mixed_precision.param_dtype=fp32",
    ]  # fmt: skip
    assert run_here(*common, f"trainer.output_dir={tmp_path}/plain") == 0
    assert run_here(*common, f"trainer.output_dir={tmp_path}/out", f"model.override_config={overrides}") == 0
    plain, changed = (metrics(tmp_path / name)[0] for name in ("plain", "out"))
    assert changed["train/loss"] != pytest.approx(plain["train/loss"], rel=1e-7)
    saved = tmp_path / "out/checkpoints/step_1/huggingface"
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    assert model.config.rope_parameters != AutoModelForCausalLM.from_pretrained(folder).config.rope_parameters
    assert changed["val/loss"] == pytest.approx(plain_loss(saved, records), rel=1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "without a head that predicts tokens: no causal"),
        ({"model_type": "vit"}, "is a vit, which transformers has no causal language model for"),
        ({"model_type": "brand_new_9"}, "does not know its architecture.*verl"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantized weights \(awq\)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized weights \(gptq\)"),
        ({"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}, "quantized weights"),
    ],
)
def test_models_that_cannot_be_trained_are_named(folder, settings, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ModelError, match=message) as caught:
        read(folder)
    assert len(str(caught.value)) < 400
