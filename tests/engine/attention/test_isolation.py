"""What is packed: prefixes are shared where a model can, and documents are apart where it would mix them."""

import json
from unittest.mock import patch

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support import tiny
from tests.support.plain import plain_loss
from tests.support.runs import metrics, run_here

SIZES = dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
QUESTION = "Please answer in one word, and do not say anything else at all: which color has "
RECORDS = [{"prompt": QUESTION + what, "response": "Green."} for what in ("grass", "a tree", "a frog", "the moon")]


def run(folder, name, *extra):
    (folder / "data.json").write_text(json.dumps(RECORDS))
    output = folder / name
    code = run_here(
        f"model.path={folder}/model", f"data.train_files={folder}/data.json", f"data.cache_dir={folder}/cache",
        "data.train_batch_size=4", "data.micro_batch_size_per_gpu=4", "data.max_length=256", "trainer.device=cpu",
        "fsdp.mixed_precision.param_dtype=fp32", "trainer.total_training_steps=2",
        f"trainer.output_dir={output}", *extra,
    )  # fmt: skip
    return code, output


def save(folder, kind, **settings):
    tiny.build_model(folder / "model")
    config = AutoConfig.for_model(kind, **SIZES, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")


EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
ROUTER_OFF = "model.router_aux_loss_coef=0"  # its loss would count a shared token once
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
RECURRENT = {
    "state space": ("mamba2", dict(num_heads=8, n_groups=2, state_size=8, chunk_size=16)),
    "linear attention and experts": (
        "qwen3_next",
        dict(layer_types=["linear_attention", "full_attention"], **EXPERTS, **LINEAR),
    ),
}


@pytest.mark.parametrize("layers", RECURRENT)
def test_recurrent_models_are_refused_before_a_weight_is_read(layers, tmp_path, capfd):
    kind, settings = RECURRENT[layers]
    save(tmp_path, kind, **settings)
    with patch("transformers.PreTrainedModel.from_pretrained", side_effect=AssertionError("weights were read")):
        code, output = run(tmp_path, "out")
    assert code == 2
    assert "is recurrent" in capfd.readouterr().err


@pytest.mark.parametrize("layers", [["conv", "full_attention"], ["full_attention", "conv"]])
def test_documents_that_a_model_would_mix_are_computed_one_by_one(layers, tmp_path):
    save(tmp_path, "lfm2", layer_types=layers)
    code, output = run(tmp_path, "out")
    assert code == 0
    assert metrics(output)[0]["train/loss"] == pytest.approx(plain_loss(tmp_path / "model", RECORDS), rel=1e-6)


def test_a_model_that_sees_later_tokens_is_refused(tmp_path, capfd):
    save(tmp_path, "bert", max_position_embeddings=512, is_decoder=False)
    code, _ = run(tmp_path, "out")
    assert code == 2
    assert "predicts tokens from later ones" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gemma3_text"])
def test_prefix_sharing_changes_weights_by_rounding_only(kind, tmp_path):
    save(tmp_path, kind)
    runs = [
        run(tmp_path, f"shared-{value}", f"model.share_prefixes={value}", ROUTER_OFF) for value in ("true", "false")
    ]
    assert [code for code, _ in runs] == [0, 0]
    shared, separate = (load_file(output / "checkpoints/step_2/huggingface/model.safetensors") for _, output in runs)
    for name, weight in separate.items():
        assert (shared[name] - weight).abs().max() < 1e-6 * max(1, weight.abs().max()), name
    losses = [[row["train/loss"] for row in metrics(output)] for _, output in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
