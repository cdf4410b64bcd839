"""Which model an argument means: runs, checkpoints, folders and adapters; what cannot be used is one message."""

import json
import shutil
import socket

import pytest
import torch

from sft_recipe.chat.compare import load_models
from sft_recipe.chat.sampling import Sampling
from sft_recipe.chat.session import Session
from sft_recipe.chat.source import find_source
from sft_recipe.checkpoint.manifest import fingerprints, write_manifest
from sft_recipe.data.render import RenderOptions
from sft_recipe.errors import CheckpointError, ConfigError, ModelError
from tests.chat.conftest import ADAPTED, ANSWER, load
from tests.chat.scripted import build_scripted_model

QUESTION = "What is the capital of France?"
CPU = torch.device("cpu")


def checkpoint(run, step, exported=None, name=None, base="owner/base"):
    """A checkpoint of a run, with an exported model."""
    folder = run / "checkpoints" / (name or f"step_{step}")
    folder.mkdir(parents=True)
    if exported:
        shutil.copytree(exported, folder / "huggingface")
    write_manifest(folder, {"step": step, "identity": {"model": f"{base} (1a2b)"}}, {})
    return folder


@pytest.fixture
def run(scripted, tmp_path):
    folder = tmp_path / "run"
    for step in (2, 10):
        checkpoint(folder, step, scripted)
    return folder


def test_run_means_its_newest_checkpoint_and_best_comes_first(run):
    assert find_source(str(run)).model.folder == run / "checkpoints/step_10/huggingface"
    assert find_source(str(run / "checkpoints")).model.folder == run / "checkpoints/step_10/huggingface"
    (run / "checkpoints/best").symlink_to("step_2")
    (run / "config.yaml").write_text("data:\n  enable_thinking: false\n  chat_template_kwargs: {effort: low}\n")
    source = find_source(str(run))
    assert source.model.folder.resolve() == run / "checkpoints/step_2/huggingface"
    assert source.trained_from == "owner/base"
    assert source.options == RenderOptions(enable_thinking=False, chat_template_kwargs={"effort": "low"})


def test_checkpoints_and_model_folders(run, tmp_path):
    source = find_source(str(run / "checkpoints/step_2"))
    assert source.model.folder == run / "checkpoints/step_2/huggingface" and source.trained_from == "owner/base"
    assert find_source(str(run / "checkpoints/step_2/huggingface")).trained_from == "owner/base"
    copied = shutil.copytree(run / "checkpoints/step_2/huggingface", tmp_path / "copied")
    source = find_source(str(copied))
    assert source.model.folder == copied and source.trained_from is None


def test_damaged_weights_of_a_checkpoint_are_refused(run):
    folder = run / "checkpoints/step_10"
    files = fingerprints(folder, ["huggingface/model.safetensors", "huggingface/config.json"])
    write_manifest(folder, {"step": 10, "identity": {"model": "owner/base (1a2b)"}}, files)
    (folder / "huggingface/config.json").open("a").write("\n")  # by its owner
    assert find_source(str(run)).checkpoint == folder
    with (folder / "huggingface/model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x7f")
    with pytest.raises(CheckpointError, match=r"step_10 is damaged: .*model.safetensors does not have its checksum"):
        find_source(str(run / "checkpoints/step_10"))


def test_adapter_is_loaded_over_its_base(adapter, scripted):
    source = find_source(str(adapter))
    assert (source.adapter, source.model.folder, source.settings) == (adapter, scripted, scripted)
    assert Session(load(adapter), Sampling()).ask(QUESTION).content == ADAPTED


def test_adapter_of_a_run_keeps_its_tokenizer_and_stop_tokens(adapter, scripted, tmp_path):
    """With --merge_lora the adapter is beside the merged model, which has the settings."""
    folder = checkpoint(tmp_path / "run", 2, scripted)
    shutil.copytree(adapter, folder / "lora_adapter")
    source = find_source(str(folder / "lora_adapter"))
    assert (source.adapter, source.settings) == (folder / "lora_adapter", folder / "huggingface")
    assert find_source(str(folder)).adapter is None
    own = shutil.copytree(adapter, tmp_path / "own")
    shutil.copy(scripted / "tokenizer.json", own)
    shutil.copy(scripted / "tokenizer_config.json", own)
    assert find_source(str(own)).settings == own


def test_base_of_an_adapter_is_the_one_that_is_loaded(adapter, scripted, tmp_path):
    """The run may have named it by a path relative to where it was started."""
    checkpoint(tmp_path / "run", 2, adapter, base="models/base")
    assert find_source(str(tmp_path / "run")).trained_from == str(scripted)
    assert [model.name for model in load_models(str(tmp_path / "run"), "", CPU)] == ["models/base", f"{tmp_path}/run"]


def test_base_and_adapter_share_one_model(adapter, scripted, monkeypatch):
    base, tuned = load_models(str(adapter), "", CPU)
    assert base._module is tuned._module and base.name == str(scripted)
    answers = [Session(model, Sampling()).ask(QUESTION).content for model in (base, tuned, base, tuned)]
    assert answers == [ANSWER, ADAPTED, ANSWER, ADAPTED]


def test_models_of_other_folders_are_compared_too(scripted, tmp_path, run):
    other = build_scripted_model(tmp_path / "other", "Hello.")
    models = load_models(str(run), str(other), CPU)
    assert [Session(model, Sampling()).ask(QUESTION).content for model in models] == ["Hello.", ANSWER]


def test_comparison_needs_a_base(scripted):
    with pytest.raises(ConfigError, match="--compare BASE"):
        load_models(str(scripted), "", CPU)


def test_local_folders_contact_no_network(adapter, run, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network was contacted")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert Session(load(adapter), Sampling()).ask(QUESTION).content == ADAPTED
    assert Session(load(run), Sampling()).ask(QUESTION).content == ANSWER


def empty_run(folder, _):
    (folder / "checkpoints/.step_2.partial").mkdir(parents=True)
    return folder


def without_export(folder, _):
    return checkpoint(folder, 2)


def lost_base(folder, adapter):
    shutil.copytree(adapter, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "/moved/away"}))
    return folder


def no_base(folder, adapter):
    shutil.copytree(adapter, folder)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def broken_config(folder, adapter):
    shutil.copytree(adapter, folder)
    (folder / "adapter_config.json").write_text("{")
    return folder


def without_weights(folder, adapter):
    shutil.copytree(adapter, folder)
    (folder / "adapter_model.safetensors").unlink()
    return folder


def other_modules(folder, adapter):
    shutil.copytree(adapter, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj", "lm_head"]}))
    return folder


def other_rank(folder, adapter):
    shutil.copytree(adapter, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"r": 4}))
    return folder


def bad_generation_config(folder, _):
    build_scripted_model(folder, ANSWER)
    (folder / "generation_config.json").write_text('{"max_new_tokens": -1}')
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty_run, "has no complete checkpoint yet"),
        (without_export, "step_2 has no exported model"),
        (lost_base, "needs its base model /moved/away: there is no model at /moved/away. If the model has moved, set "),
        (no_base, "names no base model"),
        (broken_config, "adapter_config.json cannot be read"),
        (without_weights, "cannot be loaded"),
        (other_modules, "lacks 2 weights that adapter_config.json asks for"),
        (other_rank, "cannot be loaded"),
        (bad_generation_config, "generation_config.json cannot be used"),
        (lambda folder, _: folder, "there is no model at"),
    ],
)
def test_what_cannot_be_used_is_one_message(make, message, adapter, tmp_path):
    with pytest.raises((CheckpointError, ModelError)) as error:
        load(make(tmp_path / "folder", adapter))
    assert message in str(error.value) and "\n" not in str(error.value)
