"""Examples longer than the positions that a model was made for are pointed out, or refused."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from sft_recipe.errors import ConfigError
from sft_recipe.models.stats import Positions
from tests.support import tiny
from tests.support.runs import run_here

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}


def positions(kind, **settings):
    with torch.device("meta"):
        return Positions.of(
            AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, num_hidden_layers=1, **settings))
        )


@pytest.mark.parametrize(
    "kind, settings, expected",
    [
        ("llama", dict(max_position_embeddings=128), Positions(128, are_learned=False)),
        ("llama", dict(max_position_embeddings=128, rope_parameters=YARN), Positions(512, are_learned=False)),
        ("llama", dict(max_position_embeddings=512, rope_parameters=YARN), Positions(512, are_learned=False)),
        ("gpt2", dict(n_positions=128), Positions(128, are_learned=True)),
        ("opt", dict(max_position_embeddings=128), Positions(128, are_learned=True)),
        ("bloom", {}, None),
    ],
)
def test_positions_are_read_from_configuration_and_embeddings(kind, settings, expected):
    assert positions(kind, **settings) == expected


def test_what_is_said_depends_on_the_examples():
    rotary, learned = Positions(128, are_learned=False), Positions(128, are_learned=True)
    assert rotary.notice("m", 128, 128) is None and learned.notice("m", 999, 128) is None
    assert "no example is longer yet" in rotary.notice("m", 129, 100)
    assert "the longest example has 200 tokens" in rotary.notice("m", 256, 200)
    with pytest.raises(ConfigError, match="129 tokens.*128 positions.*MAX_LENGTH=128"):
        learned.notice("m", 256, 129)


def start(folder, *extra):
    (folder / "data.json").write_text(json.dumps([{"prompt": "Hello there", "response": "I am fine. " * 40}]))
    return run_here(
        f"model.path={folder}/model", f"data.train_files={folder}/data.json", f"data.cache_dir={folder}/cache",
        f"trainer.output_dir={folder}/out", "trainer.device=cpu", "trainer.total_training_steps=1", *extra,
    )  # fmt: skip


def test_a_run_beyond_the_positions_says_so(tmp_path, capsys):
    tiny.build_model(tmp_path / "model", max_position_embeddings=64)
    assert start(tmp_path) == 0
    assert "was made for 64 positions" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_learned_positions_end_a_run_before_a_weight_is_read(tmp_path, capfd):
    tiny.build_model(tmp_path / "model")
    config = GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    assert start(tmp_path) == 2
    assert "embeddings for 64 positions only: MAX_LENGTH=64" in capfd.readouterr().err
