"""QLoRA against a plain loop of transformers, peft and bitsandbytes; what resumes, merges and runs its adapters."""

import json
import shutil
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sft_recipe.chat.loading import load_module, load_settings
from sft_recipe.chat.source import find_source
from sft_recipe.cli.export import main as export
from sft_recipe.engine.cpu.platform import use_cpu
from sft_recipe.errors import ModelError
from sft_recipe.models import quantization
from sft_recipe.models.loading import load_model
from tests.engine.test_sft_engine import COMMON, RECORDS, plain_loss
from tests.support import seq2seq, tiny
from tests.support.chaos import differences
from tests.support.runs import all_rows, metrics, run_here

pytest.importorskip("bitsandbytes", reason="bitsandbytes, which quantizes, is not installed")
use_cpu()

CPU = torch.device("cpu")
IDS = torch.arange(3, 60)[None]
SIZES = dict(hidden_size=64, intermediate_size=128, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qlora")
    tiny.build_model(folder / "model", **SIZES)
    (folder / "data.json").write_text(json.dumps(RECORDS, ensure_ascii=False))
    assert run_here(*arguments(folder, "one", "lora.merge=true", *COMMON)) == 0
    return folder


def arguments(work, name, *extra):
    return [
        f"model.path={work}/model",
        f"data.train_files={work}/data.json",
        f"data.cache_dir={work}/cache",
        f"trainer.output_dir={work}/{name}",
        "trainer.device=cpu",
        "lora.quantize=true",
        *extra,
    ]


def plain(folder):
    """The model in 4 bits as transformers loads it; its embeddings and head are not quantized."""
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings, device_map="cpu"
    )


def logits(model):
    with torch.no_grad():
        return model.train()(IDS, use_cache=False).logits  # see check_step


def check_step(work, tokenizer, output):
    """Loss and gradients of the first step, which began with B = 0, are those of a plain loop."""
    model = PeftModel.from_pretrained(
        plain(work / "model"), output / "checkpoints/step_1/lora_adapter", is_trainable=True
    )
    model.train()  # in evaluation mode bitsandbytes would repack weights for CPUs, with less precision
    trained = {name: value.detach().clone() for name, value in model.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name in trained:
                value.zero_()
    loss = plain_loss(model, tokenizer)
    loss.backward()
    assert metrics(output)[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradients = {name: value.grad for name, value in model.named_parameters() if name in trained}
    assert len(gradients) == 14 and all(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(-trained[name], gradient, rtol=1e-4, atol=1e-6)


def test_step_of_one_rank_equals_a_plain_loop(work, tokenizer):
    check_step(work, tokenizer, work / "one")


def test_step_of_one_rank_with_fsdp2_equals_a_plain_loop(work, tokenizer):
    """As on one GPU."""
    from sft_recipe.engine.sft_engine import SFTEngine

    with patch.object(SFTEngine, "is_unsharded", return_value=False):
        assert run_here(*arguments(work, "one-fsdp2", "lora.merge=true", *COMMON)) == 0
    check_step(work, tokenizer, work / "one-fsdp2")


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["fsdp.reshard_after_forward=true", "model.enable_gradient_checkpointing=true"]])
def test_step_of_two_sharded_ranks_equals_a_plain_loop(work, warm, tokenizer, extra):
    end = warm.run(arguments(work, f"two-{len(extra)}", "lora.merge=true", *COMMON, *extra), ranks=2)
    assert end.code == 0, end.output
    check_step(work, tokenizer, work / f"two-{len(extra)}")


def test_layers_with_incomplete_blocks_are_not_quantized(tmp_path):
    """bitsandbytes 0.50 would give a part of their rows the scale of another block on CPUs."""
    tiny.build_model(tmp_path, hidden_size=32, intermediate_size=64)
    config = AutoConfig.from_pretrained(tmp_path)
    packed = quantization.packed_layers(load_model(tmp_path, config, torch.bfloat16, False, CPU))
    assert set(packed) == {f"model.layers.{layer}.mlp.down_proj" for layer in range(2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_are_quantized_and_nothing_else(work, dtype):
    config = AutoConfig.from_pretrained(work / "model")
    model = load_model(work / "model", config, dtype, False, CPU)
    packed = quantization.packed_layers(model)
    assert len(packed) == 2 * 7 and "lm_head" not in packed
    others = {name: value for name, value in model.named_parameters() if name.removesuffix(".weight") not in packed}
    assert {value.dtype for value in others.values()} == {dtype} and "lm_head.weight" in others
    assert model.lm_head.weight.shape == (512, 64) and type(model.lm_head) is nn.Linear
    stored = load_file(work / "model/model.safetensors")
    levels = torch.tensor(
        [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803]
    )
    levels = torch.cat([levels, torch.tensor([0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0])])
    for name, layer in packed.items():
        weight = stored[f"{name}.weight"].to(dtype)
        assert layer.weight.nbytes == weight.numel() // 2
        rounded = quantization.round_weight(weight, dtype)
        # NF4 as the paper defines it, but for the rounding of the scales to 8 bits.
        blocks = weight.float().reshape(-1, 64)
        scales = blocks.abs().max(1, keepdim=True).values
        nearest = levels[(blocks[..., None] / scales[..., None] - levels).abs().argmin(-1)] * scales
        difference = (nearest.reshape_as(rounded) - rounded.float()).abs()
        assert (
            difference.mean() < 0.01 * scales.mean() and difference.max() < 0.35 * scales.max()
        )  # a neighboring level
    expected = load_model(work / "model", config, torch.float32)
    quantization.round_weights(expected, dtype)
    inputs = IDS if dtype == torch.float32 else IDS[:, :1]
    with torch.no_grad():
        found, wanted = model(inputs).logits.float(), expected.to(dtype)(inputs).logits.float()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-2)


def test_digest_depends_on_every_weight(work):
    config = AutoConfig.from_pretrained(work / "model")
    model = load_model(work / "model", config, torch.bfloat16, False, CPU)
    same = quantization.digest(load_model(work / "model", config, torch.bfloat16, False, CPU))
    before = quantization.digest(model)
    assert before == same < 2**63
    layer = model.model.layers[1].mlp.down_proj
    layer.weight.data.view(torch.uint8)[-1] ^= 1
    changed = quantization.digest(model)
    layer.weight.quant_state.state2.absmax[0] += 1
    assert len({before, changed, quantization.digest(model)}) == 3


def test_merged_model_is_the_adapter_over_the_4_bit_weights(work, tmp_path):
    step = work / "one/checkpoints/step_1"
    original = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    over_original = logits(PeftModel.from_pretrained(original, step / "lora_adapter"))
    trained = logits(PeftModel.from_pretrained(plain(work / "model"), step / "lora_adapter"))
    assert (trained - over_original).abs().max() > 1e-2  # what rounding to 4 bits changes
    merged = logits(AutoModelForCausalLM.from_pretrained(step / "huggingface"))
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
    assert export([str(step / "lora_adapter"), "--merge", "--out", str(tmp_path / "merged")]) == 0
    exported = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(exported, trained, rtol=1e-4, atol=1e-4)
    assert export([str(step / "lora_adapter"), "--out", str(tmp_path / "adapter")]) == 0
    assert "BitsAndBytesConfig" in (tmp_path / "adapter/README.md").read_text()
    for folder in (step / "lora_adapter", tmp_path / "adapter"):
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            assert file.metadata() == {quantization.BASE_DTYPE: "float32"}


def test_chat_loads_the_weights_that_were_trained_over(work):
    adapter = work / "one/checkpoints/step_1/lora_adapter"
    source = find_source(str(adapter))
    module = load_module(source, load_settings(source)[0], CPU)
    assert len(quantization.packed_layers(module)) == 2 * 7
    expected = logits(PeftModel.from_pretrained(plain(work / "model"), adapter))
    torch.testing.assert_close(logits(module), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_run_is_exact_and_checks_the_base(work, warm, ranks):
    """In bf16; the first step has the rate 0, and checkpoints hold neither the base nor its scales."""

    data = work / "data.json"
    settings = [
        "trainer.total_training_steps=4", "trainer.save_freq=1", "trainer.max_ckpt_to_keep=null", "optim.lr=1e-2",
        "data.train_batch_size=2", f"data.val_files={data}",
    ]  # fmt: skip

    def run(name, *extra, setup=None):
        return warm.run(arguments(work, name, *settings, *extra), ranks=ranks, setup=setup)

    assert (end := run(f"whole-{ranks}")).code == 0, end.output
    whole, stopped, other = (work / f"{name}-{ranks}" for name in ("whole", "stopped", "other"))
    for copy in (stopped, other):
        shutil.copytree(whole, copy, symlinks=True)
        for path in (copy / "checkpoints").iterdir():
            if path.name != "step_2":
                path.unlink() if path.is_symlink() else shutil.rmtree(path)
        assert [path.name for path in (copy / "checkpoints").iterdir()] == ["step_2"]
    assert (end := run(stopped.name, "trainer.resume_from=auto")).code == 0, end.output
    assert not differences(whole, stopped)
    losses = [row["val/loss"] for row in all_rows(whole) if "val/loss" in row]
    assert losses[-1] < losses[0]
    end = run(other.name, "trainer.resume_from=auto", setup=("tests.engine.test_qlora:quantize_differently", {}))
    assert end.code == 2 and "other 4-bit weights" in end.output


def quantize_differently(rank: int) -> None:
    """As another device or version of bitsandbytes would, whose kernels round otherwise."""
    real = quantization.digest
    quantization.digest = lambda model: real(model) ^ 1


def test_ranks_with_different_weights_are_an_error(work, monkeypatch):
    from sft_recipe.engine import quantized
    from sft_recipe.errors import TrainingError

    monkeypatch.setattr(quantization, "digest", lambda model: 5)
    monkeypatch.setattr(quantized.dist, "all_reduce", lambda numbers, op: numbers.copy_(torch.tensor([7, -5])))
    with pytest.raises(TrainingError, match="different 4-bit weights"):
        quantized.shared_digest(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["fsdp.strategy=fsdp"], "needs strategy fsdp2, not fsdp"),
        (["fsdp.strategy=megatron"], "needs strategy fsdp2, not megatron"),
        (["lora.enabled=false"], "LoRA is switched off"),
        (["model.freeze=[embed_tokens]"], "LoRA trains adapters only"),
    ],
)
def test_what_does_not_apply_is_one_message(work, extra, message, capfd):
    assert run_here(*arguments(work, "refused", *extra)) == 2
    assert message in capfd.readouterr().err


def test_encoder_decoders_and_missing_bitsandbytes_are_refused(work, tmp_path, capfd, monkeypatch):
    seq2seq.build_model(tmp_path / "t5")
    assert run_here(*arguments(work, "refused", f"model.path={tmp_path}/t5", "data.max_target_length=64")) == 2
    assert "lora.quantize=true does not apply to encoder-decoder models" in capfd.readouterr().err
    from sft_recipe.config import preflight

    monkeypatch.setattr(preflight, "is_installed", lambda name: name != "bitsandbytes")
    assert run_here(*arguments(work, "refused")) == 2
    assert "pip install -e '.[bitsandbytes]'" in capfd.readouterr().err


def test_model_without_linear_layers_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ModelError, match="has nothing to quantize"):
        quantization.check_quantizable(model)
