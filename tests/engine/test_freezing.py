"""Frozen weights: bit-equal after training, without gradients and optimizer state, however a model is held."""

import json
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft_recipe.engine.cpu.platform import use_cpu
from tests.engine.test_sft_engine import RECORDS, plain_loss
from tests.support import tiny
from tests.support.runs import metrics, run_here

FROZEN = ["model.layers.0.", "model.embed_tokens.", "lm_head."]  # the head is tied to the embeddings
HELD = ["unsharded", "fsdp2", "2-fsdp2", "2-fsdp"]


def arguments(folder, name, *extra):
    return [
        f"model.path={folder}/model", f"data.train_files={folder}/data.json", f"data.cache_dir={folder}/cache",
        f"trainer.output_dir={folder}/{name}", "trainer.device=cpu", "data.train_batch_size=7", "data.max_length=256",
        "optim.optimizer=SGD", "optim.override_optimizer_config={momentum: 0.9}", "optim.lr=0.1", "optim.clip_grad=0.5",
        "optim.lr_scheduler_type=constant", "optim.lr_warmup_steps_ratio=0", "trainer.total_training_steps=3",
        "fsdp.mixed_precision.param_dtype=fp32", r"model.freeze=[embeddings,'layers\.[0]\.']", *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(warm, tmp_path_factory):
    """The same run, held in different ways, and what an engine held after its last backward pass."""
    folder = tmp_path_factory.mktemp("freezing")
    tiny.build_model(folder / "model")
    (folder / "data.json").write_text(json.dumps(RECORDS, ensure_ascii=False))
    use_cpu()
    from sft_recipe.engine.sft_engine import SFTEngine

    step, engines = SFTEngine.optimizer_step, []

    def optimizer_step(engine):
        engines.append(engine)
        engine.with_gradient = {name for name, weight in engine.module.named_parameters() if weight.grad is not None}
        return step(engine)

    for name, is_unsharded in (("unsharded", True), ("fsdp2", False)):
        with (
            patch.object(SFTEngine, "is_unsharded", return_value=is_unsharded),
            patch.object(SFTEngine, "optimizer_step", optimizer_step),
        ):
            assert run_here(*arguments(folder, name)) == 0
    for name, setup in (("2-fsdp2", None), ("2-fsdp", ("tests.support.fsdp1:enable", {}))):
        end = warm.run(arguments(folder, name, f"fsdp.strategy={name[2:]}"), ranks=2, setup=setup)
        assert end.code == 0, end.output
    return folder, engines


@pytest.fixture(scope="module")
def expected(runs, tokenizer):
    """The losses and the final weights of a plain loop of PyTorch that trains the same weights."""
    model = AutoModelForCausalLM.from_pretrained(runs[0] / "model", dtype=torch.float32)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not name.startswith(tuple(FROZEN)))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.01), []
    for _ in range(3):
        loss = plain_loss(model, tokenizer)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


@pytest.mark.parametrize("held", HELD)
def test_a_frozen_run_equals_a_plain_loop_and_leaves_frozen_weights_as_they_were(runs, expected, held):
    folder, losses, weights = runs[0] / held, *expected
    assert [row["train/loss"] for row in metrics(folder)] == pytest.approx(losses, rel=1e-5)
    before = load_file(runs[0] / "model/model.safetensors")
    after = load_file(folder / "checkpoints/step_3/huggingface/model.safetensors")
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert value.equal(before[name]) == name.startswith(tuple(FROZEN))
        torch.testing.assert_close(value, weights[name].detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("held", HELD)
def test_a_checkpoint_has_optimizer_state_of_trained_weights_only(runs, held):
    names = set()
    for path in (runs[0] / held / "checkpoints/step_3/state").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    moments = {name for name in names if name.startswith("optim.state")}
    assert len(moments) == 10  # of nine weights in a layer, and of the last norm
    assert all(".layers.1." in name or "model.norm" in name for name in moments)


def test_frozen_weights_have_neither_gradients_nor_optimizer_state(runs):
    for engine in runs[1]:
        frozen = [weight for weight in engine.module.parameters() if not weight.requires_grad]
        assert len(frozen) == 10 and not any(weight in engine.optimizer.state for weight in frozen)
        assert len(engine.with_gradient) == 10
        assert all("layers.1." in name or name == "model.norm.weight" for name in engine.with_gradient)


def test_the_banner_says_what_trains_and_bf16_leaves_frozen_weights_as_they_were(runs, tmp_path, capfd):
    folder, _ = runs
    extra = ["fsdp.mixed_precision.param_dtype=bf16", f"trainer.output_dir={tmp_path}/out", "optim.optimizer=AdamW"]
    assert run_here(*arguments(folder, "out", *extra, "optim.override_optimizer_config=null")) == 0
    text = " ".join(capfd.readouterr().out.split())
    trained = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 3 * 32
    assert f"{trained:,} trainable of " in text and "model.layers.1, model.norm.weight" in text
    before = load_file(folder / "model/model.safetensors")
    after = load_file(tmp_path / "out/checkpoints/step_3/huggingface/model.safetensors")
    assert all(value.equal(before[name]) == name.startswith(tuple(FROZEN)) for name, value in after.items())


def test_a_frozen_run_resumes_exactly_and_only_with_the_same_weights_frozen(runs, tmp_path, capfd):
    folder, _ = runs
    extra = [f"trainer.output_dir={tmp_path}/out", "trainer.total_training_steps=4", "trainer.save_freq=2"]
    assert run_here(*arguments(folder, "out", *extra, "trainer.max_ckpt_to_keep=null")) == 0
    once = load_file(tmp_path / "out/checkpoints/step_4/huggingface/model.safetensors")
    extra += [f"trainer.output_dir={tmp_path}/again", f"trainer.resume_from={tmp_path}/out/checkpoints/step_2"]
    assert run_here(*arguments(folder, "out", *extra)) == 0
    again = load_file(tmp_path / "again/checkpoints/step_4/huggingface/model.safetensors")
    assert all(value.equal(once[name]) for name, value in again.items())
    other = [f"trainer.output_dir={tmp_path}/other", "model.freeze=[embeddings]"]
    assert run_here(*arguments(folder, "out", *extra, *other)) == 2
    assert "model.freeze" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("override", "expected_text"),
    [
        ("model.freeze=[encoder]", "model.freeze: the model has no encoder"),
        ("model.train_only=[layers.9]", "model.train_only: 'layers.9' is found in the name of no parameter"),
        ("model.freeze=[decoder,embeddings]", "leave no weight to train"),
        ("model.freeze=['(']", "it is not a regular expression"),
        ("model.freeze=encoder", "it should be a valid list"),
        ("lora.enabled=true", "LoRA trains adapters only"),
        ("fsdp.strategy=megatron", "model.freeze and model.train_only need FSDP"),
    ],
)
def test_bad_values_are_one_message(runs, tmp_path, capfd, override, expected_text):
    assert run_here(*arguments(runs[0], "bad", f"trainer.output_dir={tmp_path}", override)) == 2
    error = " ".join(capfd.readouterr().err.split())
    assert expected_text in error and "Traceback" not in error
