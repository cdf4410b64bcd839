"""Families of models: which one a configuration belongs to, and that its members are built, loaded and counted."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, WhisperConfig

from sft_recipe.config.compose import load_config
from sft_recipe.config.schema import ModelConfig
from sft_recipe.errors import ConfigError, ModelError
from sft_recipe.models.families import CAUSAL, SEQ2SEQ, decoder_start_token_id, family_of, fit
from sft_recipe.models.hf_config import load_hf_config
from sft_recipe.models.loading import build_model, load_model
from sft_recipe.models.resolve import ResolvedModel
from sft_recipe.models.tokenizer import check_vocabulary
from tests.support import seq2seq, tiny

KINDS = ["t5", "bart", "t5gemma2"]


def read(folder):
    return load_hf_config(ModelConfig(path=str(folder)), ResolvedModel(folder, "tiny"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_decoder_is_loaded_with_all_its_weights(kind, tmp_path):
    folder = seq2seq.build_model(tmp_path / kind, kind)
    config = read(folder)
    assert family_of(config) is SEQ2SEQ
    expected = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    found = load_model(folder, config, torch.float32).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert type(build_model(config)) is type(load_model(folder, config, torch.float32))


def test_the_files_of_a_t5_say_whether_its_head_is_untied(tmp_path):
    folder = seq2seq.build_model(tmp_path / "t5")
    path, tied = folder / "model.safetensors", load_file(folder / "model.safetensors")
    save_file(tied | {"lm_head.weight": tied["shared.weight"].clone()}, path, metadata={"format": "pt"})
    assert read(folder).tie_word_embeddings
    equal = load_model(folder, read(folder), torch.float32)
    assert equal.lm_head.weight is equal.shared.weight
    own = read(seq2seq.write_untied_head(folder))
    assert not own.tie_word_embeddings
    model, shell = load_model(folder, own, torch.float32), build_model(own)
    assert torch.equal(model.lm_head.weight, load_file(path)["lm_head.weight"])
    for built in (model, shell):
        assert built.encoder.embed_tokens.weight is built.decoder.embed_tokens.weight is built.shared.weight
        assert sum(weight.numel() for weight in built.parameters()) == sum(w.numel() for w in tied.values()) + 512 * 32


def test_a_damaged_file_is_left_to_those_who_need_the_weights(tmp_path):
    folder = seq2seq.write_untied_head(seq2seq.build_model(tmp_path / "t5"))
    (folder / "model.safetensors").write_bytes(b"{")
    assert read(folder).tie_word_embeddings
    (folder / "model.safetensors").unlink()
    assert read(folder).tie_word_embeddings


def test_the_files_are_not_overridden(tmp_path):
    folder = seq2seq.write_untied_head(seq2seq.build_model(tmp_path / "t5"))
    tied, untied = (
        ModelConfig(path=str(folder), override_config={"tie_word_embeddings": value, "dropout_rate": 0.5})
        for value in (True, False)
    )
    assert load_hf_config(untied, ResolvedModel(folder, "tiny")).dropout_rate == 0.5
    with pytest.raises(ConfigError, match="tie_word_embeddings=True has no effect on T5Config"):
        load_hf_config(tied, ResolvedModel(folder, "tiny"))


def test_another_encoder_decoder_with_an_untied_head_is_refused(tmp_path):
    folder = seq2seq.build_model(tmp_path / "bart", "bart")
    weights = load_file(folder / "model.safetensors")
    head = torch.zeros_like(weights["model.shared.weight"])
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="different lm_head.weight. A bart with such weights is not supported"):
        load_model(folder, read(folder), torch.float32)


def test_a_decoder_stays_a_causal_model(tmp_path):
    assert family_of(read(tiny.build_model(tmp_path / "model"))) is CAUSAL


def test_an_encoder_decoder_of_another_task_is_refused(tmp_path):
    WhisperConfig(architectures=["WhisperForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a whisper, which transformers has no encoder-decoder model for"):
        read(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_starts_with_the_token_of_the_models_own_code(kind, tmp_path):
    config = read(seq2seq.build_model(tmp_path / kind, kind))
    shifted = build_model(config).prepare_decoder_input_ids_from_labels(labels=torch.tensor([[5, 6]]))
    assert shifted.tolist() == [[decoder_start_token_id(config), 5]]


@pytest.mark.parametrize("kind, attention", [("t5", "eager"), ("bart", "sdpa"), ("t5gemma2", "sdpa")])
def test_auto_and_null_get_their_values(kind, attention, tmp_path):
    config = fit(load_config(["data.max_length=64"]), read(seq2seq.build_model(tmp_path / kind, kind)))
    assert (config.data.max_target_length, config.data.train_on, config.data.token_budget) == (64, "last", 128)
    assert (config.model.attn_implementation, config.model.share_prefixes) == (attention, False)


@pytest.mark.parametrize(
    "setting",
    [
        "fsdp.strategy=megatron",
        "fsdp.ulysses_sequence_parallel_size=2",
        "model.share_prefixes=true",
        "model.attn_implementation=sft_packed",
        "data.train_on_reasoning=false",
        "data.thinking_mix=0.5",
    ],
)
def test_a_setting_for_decoders_is_refused(setting, tmp_path):
    with pytest.raises(ConfigError, match=f"{setting.partition('=')[0]}.* does not apply to encoder-decoder models"):
        fit(load_config([setting]), read(seq2seq.build_model(tmp_path / "t5")))


@pytest.mark.parametrize("key", ["decoder_start_token_id", "pad_token_id"])
def test_a_token_that_the_decoder_needs_is_missing(key, tmp_path):
    folder = seq2seq.build_model(tmp_path / "t5")
    settings = json.loads((folder / "config.json").read_text()) | {key: None}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=f"no {key}.*override_config={{{key}: NUMBER}}"):
        fit(load_config([]), read(folder))


def test_a_decoder_has_no_length_of_targets(tmp_path):
    with pytest.raises(ConfigError, match="data.max_target_length is for encoder-decoder models"):
        fit(load_config(["data.max_target_length=8"]), read(tiny.build_model(tmp_path / "model")))


def test_weights_for_images_do_not_train(tmp_path):
    from sft_recipe.models.stats import model_stats

    folder = seq2seq.build_model(tmp_path / "model", "t5gemma2")
    config = fit(load_config([f"model.path={folder}"]), read(folder))
    model = load_model(folder, read(folder), torch.float32)
    model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[7]])).loss.backward()
    assert all((weight.grad is not None) == weight.requires_grad for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    stats = model_stats(config, ResolvedModel(folder, "tiny"), "cpu")
    assert stats.trainable == trained < stats.total == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(kind, tmp_path):
    folder = seq2seq.build_model(tmp_path / "model", kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_vocabulary(tokenizer, ResolvedModel(folder, "tiny"))
    tokenizer.add_tokens([f"word {number}" for number in range(512)])
    with pytest.raises(ModelError, match="tiny has 512 embeddings"):
        check_vocabulary(tokenizer, ResolvedModel(folder, "tiny"))
