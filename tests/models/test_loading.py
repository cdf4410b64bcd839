"""A model is trained from the weights of its folder, or not at all."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from sft_recipe.errors import ModelError
from sft_recipe.models.loading import load_model
from sft_recipe.models.resolve import _checked_folder
from tests.support import tiny
from tests.support.runs import run_here


def change(folder, function):
    """Rewrite the folder's weights."""
    path = folder / "model.safetensors"
    weights = function(load_file(path))
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path, metadata={"format": "pt"})


def load(folder, **settings):
    config = AutoConfig.from_pretrained(folder, **settings)
    return load_model(folder, config, torch.float32)


def without(*names):
    return lambda weights: {name: weight for name, weight in weights.items() if name not in names}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def is_tied(request):
    return request.param


@pytest.fixture
def folder(tmp_path, is_tied):
    return tiny.build_model(tmp_path / "model", tie_word_embeddings=is_tied)


def test_a_complete_folder_loads_with_its_weights(folder, is_tied):
    model, stored = load(folder), load_file(folder / "model.safetensors")
    assert torch.equal(model.get_input_embeddings().weight, stored["model.embed_tokens.weight"])
    head = "model.embed_tokens.weight" if is_tied else "lm_head.weight"
    assert torch.equal(model.get_output_embeddings().weight, stored[head])


def test_missing_weights_are_named(folder):
    change(folder, without("model.layers.1.mlp.up_proj.weight", "model.norm.weight"))
    with pytest.raises(ModelError, match=r"lacks 2 .*model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight"):
        load(folder)


@pytest.mark.parametrize("prefix", ["base_model.model.", "_orig_mod.", "module.", "_fsdp_wrapped_module."])
def test_prefixes_of_other_tools_are_named_as_the_cause(folder, prefix):
    change(folder, lambda weights: {prefix + name: weight for name, weight in weights.items()})
    with pytest.raises(ModelError, match=f"begin with '{prefix}'"):
        load(folder)


@pytest.mark.parametrize("is_tied", [False], indirect=True)
def test_a_missing_head_is_an_error_that_names_tying(folder):
    change(folder, without("lm_head.weight"))
    with pytest.raises(ModelError, match=r"lm_head\.weight.*tie_word_embeddings: true"):
        load(folder)
    assert load(folder, tie_word_embeddings=True) is not None


@pytest.mark.parametrize("is_tied", [False], indirect=True)
def test_weights_that_are_tied_by_mistake_are_an_error(folder):
    with pytest.raises(ModelError, match=r"lm_head\.weight.*tie_word_embeddings: false"):
        load(folder, tie_word_embeddings=True)


@pytest.mark.parametrize("is_tied", [False], indirect=True)
def test_equal_weights_of_head_and_embeddings_may_be_tied(folder):
    change(folder, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    model = load(folder, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_of_another_shape_are_named_with_both(folder):
    with pytest.raises(ModelError, match=r"down_proj\.weight has the shape \(32, 64\).*asks for \(32, 48\).* more"):
        load(folder, intermediate_size=48)


def test_weights_without_a_place_are_a_warning(folder, caplog):
    change(folder, lambda weights: weights | {"model.extra.weight": torch.ones(2)})
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert "holds 1 weights" in caplog.text and "model.extra.weight" in caplog.text


@pytest.mark.parametrize("extra", [[], ["lora.enabled=true"]], ids=["full", "lora"])
def test_a_run_ends_before_training_where_weights_are_missing(tmp_path, capfd, extra):
    folder = tiny.build_model(tmp_path / "model")
    change(folder, without("model.layers.0.self_attn.q_proj.weight"))
    (tmp_path / "data.json").write_text('[{"prompt": "a", "response": "b"}]')
    code = run_here(
        f"model.path={folder}", f"data.train_files={tmp_path}/data.json", f"data.cache_dir={tmp_path}/cache",
        f"trainer.output_dir={tmp_path}/out", "trainer.device=cpu", *extra,
    )  # fmt: skip
    error = capfd.readouterr().err
    assert code == 2 and "model.layers.0.self_attn.q_proj.weight" in error and "Traceback" not in error
    assert not (tmp_path / "out/metrics.jsonl").exists()


@pytest.mark.parametrize("content", ["[]", "3", "{"])
def test_a_config_json_that_is_no_object_is_one_message(tmp_path, capfd, content):
    folder = tiny.build_model(tmp_path / "model")
    (folder / "config.json").write_text(content)
    (tmp_path / "data.json").write_text('[{"prompt": "a", "response": "b"}]')
    code = run_here(
        f"model.path={folder}", f"data.train_files={tmp_path}/data.json", f"data.cache_dir={tmp_path}/cache",
        f"trainer.output_dir={tmp_path}/out", "trainer.device=cpu",
    )  # fmt: skip
    error = capfd.readouterr().err
    assert code == 2 and str(folder) in error and "Traceback" not in error


def shard(folder):
    """Split the weights into two files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"model-0000{1 + (index % 2)}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: weights[name] for name in names if places[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def not_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"\x80\x02}q\x00." * 20)


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def other_name(folder):
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


def broken_index(folder):
    (folder / "model.safetensors.index.json").write_text("{")


def adapter_beside(folder):
    (folder / "adapter_config.json").write_text("{}")


def integers(folder):
    change(folder, lambda weights: {name: (weight * 100).to(torch.int8) for name, weight in weights.items()})


DAMAGES = {
    integers: "such weights are quantized",
    missing_shard: "lacks model-00002-of-00002.safetensors",
    truncated: "the download or copy is incomplete",
    pointer: "git lfs pull",
    not_safetensors: "is no safetensors file",
    empty: "is no safetensors file",
    other_name: "has neither model.safetensors nor",
    broken_index: "index.json cannot be read",
    adapter_beside: "holds a LoRA adapter beside the model",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_folders_are_found_by_their_headers(tmp_path, damage):
    folder = tiny.build_model(tmp_path / "model")
    assert _checked_folder(folder, needs_weights=True) == folder
    damage(folder)
    with pytest.raises(ModelError, match=DAMAGES[damage]):
        _checked_folder(folder, needs_weights=True)


def test_shards_that_are_all_there_are_accepted(tmp_path):
    folder = tiny.build_model(tmp_path / "model")
    shard(folder)
    assert _checked_folder(folder, needs_weights=True) == folder
