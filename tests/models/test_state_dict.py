"""State dicts (.pth, .bin) compute what their own models compute; anything else is refused, and runs no code."""

import json
import math
import os
import pickle
import random
from contextlib import suppress

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from sft_recipe.config.schema import ModelConfig
from sft_recipe.errors import ModelError
from sft_recipe.models.minimind import random_model
from sft_recipe.models.resolve import resolve_model, resolve_tokenizer
from sft_recipe.models.state_dict import read_state_dict
from sft_recipe.models.tokenizer import read_tokenizer
from tests.models.hub import find
from tests.support.shared import shared_data

EARLY = dict(vocab_size=6400, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=8)
EARLY |= dict(num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=1e6, tie_word_embeddings=True)
IDS = torch.arange(5, 69).reshape(2, 32)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("name", "weights"), [("minimind", "pretrain_64.pth"), ("minimind_moe", "pretrain_64_moe.pth")]
)
def test_minimind_has_the_loss_that_its_own_code_computes(cache_dir, name, weights):
    data = shared_data(name)
    model = load(find(data / weights, cache_dir).folder)
    total = count = 0.0
    for line in (data / "tokens.jsonl").read_text().splitlines()[:4]:
        record = json.loads(line)
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([record["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(record["labels"][1:])
        total += float(cross_entropy(rows, labels, reduction="sum"))
        count += int((labels != -100).sum())
    expected = json.loads((data / "trace.json").read_text())["steps"][0]["loss"]
    assert total / count == pytest.approx(expected, abs=1e-5)
    assert model.config.tie_word_embeddings and model.config.pad_token_id is None


def early_minimind(seed=0, **overrides):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**EARLY, **overrides})).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_early_minimind_is_a_llama(cache_dir, tmp_path, dtype):
    model = early_minimind()
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    torch.save(weights | {"model.freqs_cos": torch.zeros(4)}, tmp_path / "full_sft_64.pth")
    loaded = load(find(tmp_path / "full_sft_64.pth", cache_dir).folder)
    model.load_state_dict(weights)
    assert torch.equal(logits(loaded), logits(model))


def test_head_of_its_own_is_kept(cache_dir, tmp_path):
    model = early_minimind(tie_word_embeddings=False)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    loaded = load(find(tmp_path / "a.pth", cache_dir).folder)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("config_name", ["config.json", "model_config.json"])
@pytest.mark.parametrize("file_name", ["pytorch_model.bin", "best.pth"])
def test_config_beside_the_weights_says_what_model_it_is(cache_dir, tmp_path, config_name, file_name):
    model = early_minimind(num_attention_heads=4, vocab_size=512)
    settings = model.config.to_diff_dict()
    settings.pop("architectures", None)
    (tmp_path / config_name).write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_text("{}")
    torch.save(model.state_dict(), tmp_path / file_name)
    folder = find(tmp_path / file_name, cache_dir).folder
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert torch.equal(logits(load(folder)), logits(model))


def test_shared_weights_of_an_encoder_decoder_model_are_kept(cache_dir, tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    (tmp_path / "model_config.json").write_text(json.dumps(model.config.to_diff_dict()))
    torch.save(model.state_dict(), tmp_path / "chatlm.bin")
    folder = find(tmp_path / "chatlm.bin", cache_dir).folder
    loaded = T5ForConditionalGeneration.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["T5ForConditionalGeneration"]


def test_changed_file_is_converted_again(cache_dir, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(early_minimind().state_dict(), path)
    first = find(path, cache_dir).folder
    assert find(path, cache_dir).folder == first
    torch.save(early_minimind(seed=1).state_dict(), path)
    assert find(path, cache_dir).folder != first


def test_tokenizer_beside_the_weights_belongs_to_them(cache_dir, tmp_path):
    torch.save(early_minimind().state_dict(), tmp_path / "a.pth")
    alone = find(tmp_path / "a.pth", cache_dir).folder
    assert not (alone / "tokenizer.json").exists()
    for text in ("{}", "{ }"):
        (tmp_path / "tokenizer.json").write_text(text)
        assert (find(tmp_path / "a.pth", cache_dir).folder / "tokenizer.json").read_text() == text


class Attack:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


TINY = {"model.embed_tokens.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (Attack(), "holds more than tensors"),
        ({"weight": Attack()}, "holds more than tensors"),
        ({"model": TINY, "optimizer": {}, "epoch": 1}, "state of an interrupted run.*as in full_sft_64.pth"),
        ([1, 2], "holds no state dict: expected tensors by name"),
        ({}, "holds no state dict"),
        ({"state_dict": TINY}, "holds no state dict: 'state_dict' is no tensor but a dict"),
        ({"": 5}, "holds no state dict: '' is no tensor but a int"),
        ({0: torch.zeros(2)}, "holds no state dict: its key 0 is no name"),
        (TINY | {("a",): torch.zeros(2)}, r"its key \('a',\) is no name"),
        (TINY | {"a": torch.eye(2).to_sparse()}, "holds 'a' as a sparse,"),
        (TINY | {"a": torch.empty(2, device="meta")}, "holds 'a' as a sparse,"),
        (
            TINY | {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)},
            "has not all weights of a model of MiniMind",
        ),
        (
            {
                "model.embed_tokens.weight": torch.zeros(6400, 8),
                "model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 8),
                "model.layers.0.self_attn.k_proj.weight": torch.zeros(4, 8),
            },
            "has not all weights of a model of MiniMind",
        ),
        ({"encoder.weight": torch.zeros(2)}, "not a model of MiniMind, and there is no config.json beside it"),
        (dict(early_minimind(vocab_size=64).state_dict()), "number of attention heads cannot be read"),
        (dict(early_minimind().state_dict()) | {"model.layers.0.mlp.shared_experts.0.w": TINY}, "is no tensor"),
        (
            dict(early_minimind().state_dict()) | {"model.layers.0.mlp.shared_experts.0.w": torch.zeros(1)},
            "shared experts, which are not supported",
        ),
    ],
)
def test_anything_else_is_refused(cache_dir, tmp_path, monkeypatch, content, problem):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "full_sft_64_resume.pth"
    torch.save(content, path)
    with pytest.raises(ModelError, match=problem):
        find(path, cache_dir)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no weights",
        pickle.dumps([1]),
        b"PK\x03\x04" + bytes(100),
        b"\x80\x02.",
        b"\x80\x02}q\x00(X\x01\x00\x00\x00aK\x01u.",
    ],
)
def test_damaged_file_is_refused(cache_dir, tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ModelError, match=r"a\.pth (holds|cannot be read)"):
        find(tmp_path / "a.pth", cache_dir)


def test_every_damaged_byte_of_a_file_is_refused_in_words_or_read(tmp_path):
    torch.save({"a": torch.arange(4.0), "b": torch.ones(2, 2)}, tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    draw = random.Random(0)
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[draw.randrange(len(content))] = draw.randrange(256)
        (tmp_path / "b.pth").write_bytes(damaged)
        with suppress(ModelError):
            assert all(isinstance(tensor, torch.Tensor) for tensor in read_state_dict(tmp_path / "b.pth").values())


def test_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "a.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    with pytest.raises(ModelError, match="is a pointer of Git LFS"):
        read_state_dict(path)


def test_bad_config_beside_the_weights_is_named(cache_dir, tmp_path):
    torch.save(TINY, tmp_path / "a.pth")
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    with pytest.raises(ModelError, match=r"config\.json describes no model of transformers"):
        find(tmp_path / "a.pth", cache_dir)


def test_missing_file_is_reported(cache_dir):
    with pytest.raises(ModelError, match="there is no model at .*none.pth"):
        find("none.pth", cache_dir)


@pytest.mark.parametrize("name", ["a.pth", "minimind:hidden_size=64,num_hidden_layers=1"])
def test_missing_tokenizer_is_named_with_its_flag(cache_dir, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    torch.save(early_minimind().state_dict(), tmp_path / "a.pth")
    config = ModelConfig(path=name, fallback=None)
    with pytest.raises(ModelError, match="has no tokenizer beside it: name its folder with --tokenizer_path"):
        resolve_tokenizer(config, resolve_model(config, cache_dir), cache_dir)


@pytest.mark.parametrize(
    "config",
    [T5Config(), Qwen2Config(hidden_size=64, num_hidden_layers=1, vocab_size=8)],
    ids=lambda config: config.model_type,
)
def test_programs_without_a_flag_for_the_tokenizer_say_where_it_belongs(tmp_path, config):
    """Transformers makes a tokenizer without vocabulary; of an empty prompt a model answers nothing."""
    config.save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path).encode("你好")) <= 3  # unknown tokens and an end, or nothing
    with pytest.raises(ModelError, match="^a.pth has no tokenizer beside it: copy tokenizer.json"):
        read_tokenizer(tmp_path, "a.pth", trust_remote_code=False)


# Random weights


def test_random_minimind_has_the_named_sizes(cache_dir):
    model = load(find("minimind:hidden_size=64,num_hidden_layers=2", cache_dir).folder)
    config = model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers, config.vocab_size) == (
        "qwen3",
        64,
        2,
        6400,
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 8)
    assert config.intermediate_size == math.ceil(64 * math.pi / 64) * 64
    assert config.rope_parameters["rope_theta"] == 1e6 and config.rms_norm_eps == 1e-6
    assert float(model.model.embed_tokens.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_random_weights_depend_on_the_name_alone(cache_dir, tmp_path):
    torch.manual_seed(1)
    name = "minimind:num_hidden_layers=1,hidden_size=64,use_moe=1"
    first = load(random_model(name, cache_dir))
    torch.manual_seed(2)
    second = load(random_model("minimind:use_moe=1,hidden_size=64,num_hidden_layers=1", tmp_path / "other"))
    assert first.config.model_type == "qwen3_moe" and first.config.num_experts_per_tok == 1
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ("hidden=64", "no size 'hidden'; did you mean hidden_size"),
        ("xyz=64", "no size 'xyz'; there are hidden_size"),
        ("hidden_size=big", "hidden_size is 'big'; expected a whole number"),
        ("hidden_size", "hidden_size is ''"),
        ("num_hidden_layers=0", "num_hidden_layers is '0'"),
        ("hidden_size=100", "an even multiple of num_attention_heads=8"),
        ("num_key_value_heads=3", "a multiple of num_key_value_heads=3"),
    ],
)
def test_sizes_that_cannot_be_are_refused(cache_dir, sizes, problem):
    with pytest.raises(ModelError, match=problem):
        find(f"minimind:{sizes}", cache_dir)
