"""--format pth writes what MiniMind reads: its names, its precision, its adapters; its own files are read back."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sft_recipe.cli.export import main
from sft_recipe.models.minimind import random_model
from tests.support import seq2seq, tiny

IDS = torch.arange(3, 60)[None]
SIZES = "minimind:hidden_size=64,num_hidden_layers=2"
SQUARE = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qo"]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def build(folder, sizes=SIZES):
    """Return a folder with MiniMind's model and a small tokenizer."""
    model = random_model(sizes, folder)
    tiny.build_tokenizer().save_pretrained(model)
    return model


def logits(model):
    with torch.no_grad():
        return model.float().eval()(IDS).logits


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def weights_of(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("sizes", [SIZES, f"{SIZES},use_moe=1"])
def test_state_dict_has_the_names_of_minimind(tmp_path, sizes):
    model = build(tmp_path, sizes)
    assert main([str(model), "--out", str(tmp_path / "out"), "--format", "pth"]) == 0
    name = "full_sft_64_moe.pth" if "moe" in sizes else "full_sft_64.pth"
    weights = weights_of(tmp_path / "out" / name)
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    mlp = "model.layers.1.mlp." + ("experts.3." if "moe" in sizes else "")
    assert weights[f"{mlp}gate_proj.weight"].shape == (256, 64)
    out = tmp_path / "again"
    path = tmp_path / "out" / name
    assert main([str(model), "--out", str(out), "--format", "pth", "--dtype", "float32"]) == 0
    source = load(model)
    for key, value in weights_of(out / name).items():
        if "experts" not in key:
            assert torch.equal(value, source.state_dict()[key]), key
    assert path.is_file()


def adapter_of(model, folder, **settings):
    """Save an adapter of PEFT with random weights; returns the logits with it."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], **settings}
    adapted = get_peft_model(load(model), LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(model)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return logits(adapted)


def minimind_logits(model, weights):
    """Compute as MiniMind does: x W + x A B in every square layer."""
    for module, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer.in_features == layer.out_features:
            a, b = (weights.pop(f"{module}.lora.{part}.weight").float() for part in "AB")
            assert a.shape[0] == b.shape[1] == 16
            layer.register_forward_hook(lambda _, inputs, output, a=a, b=b: output + inputs[0] @ a.T @ b.T)
    assert not weights
    return logits(model)


@pytest.mark.parametrize("modules", [["q_proj", "o_proj"], ["q_proj"]])
def test_adapter_computes_in_minimind_what_it_computes_here(tmp_path, modules):
    model = build(tmp_path)
    expected = adapter_of(model, tmp_path / "adapter", target_modules=modules)
    arguments = ["--adapter", str(tmp_path / "adapter"), "--format", "pth", "--dtype", "float32"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    weights = weights_of(tmp_path / "out/lora_64.pth")
    assert sorted({name.partition(".lora.")[0] for name in weights}) == sorted(SQUARE)
    assert torch.allclose(minimind_logits(load(model), weights), expected, atol=1e-5)
    assert not torch.allclose(logits(load(model)), expected, atol=1e-3)


def test_adapter_of_minimind_is_merged(tmp_path):
    model = build(tmp_path)
    torch.manual_seed(0)
    weights = {}
    for module in SQUARE:
        weights[f"{module}.lora.A.weight"] = 0.1 * torch.randn(16, 64)
        weights[f"{module}.lora.B.weight"] = 0.1 * torch.randn(64, 16)
    torch.save(weights, tmp_path / "lora_medical_64.pth")
    arguments = ["--adapter", str(tmp_path / "lora_medical_64.pth"), "--model", str(model), "--merge"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert torch.allclose(logits(load(tmp_path / "out")), minimind_logits(load(model), weights), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, "are on square layers only"),
        ({"r": 32}, "have rank 16, not 32"),
        ({"use_dora": True}, "are plain LoRA of one rank"),
    ],
)
def test_adapter_that_minimind_lacks_is_refused(tmp_path, capsys, settings, problem):
    model = build(tmp_path)
    adapter_of(model, tmp_path / "adapter", **settings)
    assert main(["--adapter", str(tmp_path / "adapter"), "--format", "pth", "--out", str(tmp_path / "out")]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_model_that_minimind_lacks_is_refused(tmp_path, model_dir, capsys):
    assert main([str(model_dir), "--format", "pth", "--out", str(tmp_path / "out")]) == 2
    expected = "is no model of MiniMind, but a llama: --format pth is for MiniMind's architecture, --format hf for all"
    assert expected in capsys.readouterr().err
    model = build(tmp_path, f"{SIZES},num_attention_heads=4")
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 10000.0
    (model / "config.json").write_text(json.dumps(config))
    assert main([str(model), "--format", "pth", "--out", str(tmp_path / "out")]) == 2
    assert "is no model of MiniMind, where rope_parameters is" in capsys.readouterr().err
    t5 = seq2seq.build_model(tmp_path / "t5")
    assert main([str(t5), "--format", "pth", "--out", str(tmp_path / "out")]) == 2
    assert "is no model of MiniMind, but a t5: --format pth is for" in capsys.readouterr().err


@pytest.mark.parametrize(
    "weights",
    [
        {"model.embed_tokens.weight": torch.zeros(2, 2)},
        {"q.lora.A.weight": torch.zeros(16, 4)},
        {"q.lora.A.weight": torch.zeros(16, 4), "q.lora.B.weight": torch.zeros(4, 8)},
    ],
)
def test_other_files_are_no_adapters(tmp_path, capsys, weights):
    torch.save(weights, tmp_path / "a.pth")
    arguments = ["--adapter", str(tmp_path / "a.pth"), "--model", "SmolLM2-135M-Instruct", "--out", str(tmp_path / "o")]
    assert main(arguments) == 2
    assert "is no LoRA file of MiniMind" in capsys.readouterr().err
