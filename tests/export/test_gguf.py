"""A GGUF file computes what the trained model computes; what it cannot hold is refused."""

import json

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file
from tokenizers import Regex, decoders, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sft_recipe.cli.export import main
from sft_recipe.export.gguf_tokenizer import SPLITS, read_tokenizer
from tests.support import seq2seq, tiny

SIZE = dict(
    vocab_size=520, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "llama_untied": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=False)),
    "llama3_rope": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, rope_parameters=LLAMA3)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZE, rope_theta=1e6)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE, head_dim=32, tie_word_embeddings=True)),
}


def split_text(tokenizer, name: str) -> None:
    """Give the tokenizer another way to split text before merging."""
    expression, digits, use_regex = next(key for key, value in SPLITS.items() if value == name)
    parts = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)]
    if digits:
        parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if expression:
        parts.insert(0, pre_tokenizers.Split(Regex(expression), "isolated"))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)


def build(folder, make, template: str | None = tiny.CHATML, split: str = "gpt-2"):
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which are constant in a new model
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer = tiny.build_tokenizer(template)
    split_text(tokenizer, split)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quant", ["f16", "q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_file_computes_what_the_model_computes(name, quant, tmp_path, capsys):
    folder = build(tmp_path / "model", MODELS[name])
    command = [str(folder), "--format", "gguf", "--quant", quant, "--out", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["files"].keys() == {f"model-{quant}.gguf", "Modelfile", "README.md"}
    assert 0 < result["verification"]["relative_difference"] < {"f16": 2e-3, "q8_0": 6e-2}[quant]
    assert result["verification"]["same_choices"] > 100
    fields = gguf.GGUFReader(tmp_path / f"out/model-{quant}.gguf").fields
    end = tiny.build_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert fields["tokenizer.ggml.eos_token_id"].contents() == end
    assert fields["tokenizer.chat_template"].contents() == tiny.CHATML
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 520


def test_weights_are_those_of_the_model(tmp_path):
    """Not by transformers: of a Llama's queries, rows of the two halves of a head alternate; all else is as it was."""
    folder = build(tmp_path / "model", MODELS["llama_untied"])
    assert main([str(folder), "--format", "gguf", "--out", str(tmp_path / "out")]) == 0
    tensors = gguf.GGUFReader(tmp_path / "out/model-f16.gguf").tensors
    found = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}
    stored = {name: value.numpy() for name, value in load_file(folder / "model.safetensors").items()}
    assert len(found) == len(stored)
    np.testing.assert_allclose(found["output.weight"], stored["lm_head.weight"], atol=1e-3)
    np.testing.assert_allclose(
        found["blk.1.attn_v.weight"], stored["model.layers.1.self_attn.v_proj.weight"], atol=1e-3
    )
    np.testing.assert_array_equal(found["output_norm.weight"], stored["model.norm.weight"])
    head = stored["model.layers.0.self_attn.q_proj.weight"][16:32]  # the second one
    np.testing.assert_allclose(found["blk.0.attn_q.weight"][16:32:2], head[:8], atol=1e-3)
    np.testing.assert_allclose(found["blk.0.attn_q.weight"][17:32:2], head[8:], atol=1e-3)


@pytest.mark.parametrize("split", sorted(set(SPLITS.values()) - {"llama-bpe"}))
def test_tokenizer_of_the_file_computes_the_same_tokens(split, tmp_path):
    folder = build(tmp_path / "model", MODELS["llama"], split=split)
    assert main([str(folder), "--format", "gguf", "--out", str(tmp_path / "out")]) == 0
    path = tmp_path / "out/model-f16.gguf"
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == split
    ours = tiny.build_tokenizer()
    split_text(ours, split)
    text = "<|im_start|>user\nIt's 12345 o'clock,  你好\n\n don't<|im_end|>"
    assert read_tokenizer(path).encode(text).ids == ours(text, add_special_tokens=False)["input_ids"]


def refused(folder, tmp_path, capsys) -> str:
    before = set(tmp_path.iterdir())
    assert main([str(folder), "--format", "gguf", "--out", str(tmp_path / "out")]) == 2
    assert set(tmp_path.iterdir()) == before
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error
    return error


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**SIZE)), "this model is a mistral"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZE, rope_parameters=LINEAR)), "of the type linear"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZE, attention_bias=True)), "biases in its attention"),
    ],
)
def test_model_that_the_format_cannot_hold_is_refused(make, message, tmp_path, capsys):
    assert message in refused(build(tmp_path / "model", make), tmp_path, capsys)


def test_unknown_way_to_split_text_is_refused(tmp_path, capsys):
    folder = build(tmp_path / "model", MODELS["llama"])
    tokenizer = tiny.build_tokenizer()
    parts = [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.save_pretrained(folder)
    assert "splits text in another way" in refused(folder, tmp_path, capsys)


def test_tokenizer_of_another_kind_is_refused(tmp_path, capsys):
    folder = build(tmp_path / "model", MODELS["llama"])
    tokenizer = tiny.build_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    tokenizer.save_pretrained(folder)
    assert "has no byte-level BPE tokenizer" in refused(folder, tmp_path, capsys)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format", "gguf", "--dtype", "float16"], "--dtype float16 is for --format hf"),
        (["--quant", "q8_0"], "--quant q8_0 is for --format gguf"),
        (["--format", "gguf", "--quant", "q4_0"], "invalid choice"),
    ],
)
def test_flags_that_do_not_fit_are_errors(args, message, model_dir, tmp_path, capsys):
    assert main([str(model_dir), "--out", str(tmp_path / "out"), *args]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_adapter_of_a_model_that_no_gguf_file_holds_is_not_asked_to_be_merged(tmp_path, capsys):
    base, adapter = seq2seq.build_model(tmp_path / "t5"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert main(["--adapter", str(adapter), "--format", "gguf", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "this model is a t5" in error and "--merge" not in error


def test_wrong_order_of_rows_is_found(tmp_path, monkeypatch, capsys):
    from sft_recipe.export import gguf as ours

    monkeypatch.setattr(ours, "_arranged", lambda weight, name, config: weight.numpy())
    folder = build(tmp_path / "model", MODELS["llama"])
    assert "the export is not the trained model" in refused(folder, tmp_path, capsys)


def test_file_loads_with_transformers_alone(tmp_path):
    folder = build(tmp_path / "model", MODELS["llama"])
    assert main([str(folder), "--format", "gguf", "--out", str(tmp_path / "out")]) == 0
    ids = torch.arange(3, 60)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model-f16.gguf", dtype=torch.float32)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, atol=2e-2, rtol=1e-2)
