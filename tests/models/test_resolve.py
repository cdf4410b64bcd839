"""Models and tokenizers are found in folders, the hub cache and on the hub; failures say what to do."""

import re
import shutil
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from sft_recipe.config.schema import ModelConfig
from sft_recipe.errors import ModelError
from sft_recipe.models.resolve import resolve_model, resolve_tokenizer
from tests.models.hub import HUB_NAME, cached_model, downloads, find
from tests.support import tiny


def test_model_folder_is_used_in_place(model_dir, cache_dir):
    found = find(model_dir, cache_dir)
    assert (found.folder, found.name, found.notice) == (model_dir, str(model_dir), None)
    assert not cache_dir.exists()


@pytest.mark.parametrize("name", ["~/my/model", "./my/model", "my/model"])
def test_folder_may_be_relative_to_home_or_working_directory(name, model_dir, cache_dir, tmp_path, monkeypatch):
    """`my/model` could be a hub id; what is there comes first."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, tmp_path / "my" / "model")
    found = find(name, cache_dir)
    assert found.folder.samefile(tmp_path / "my" / "model")
    assert found.name == name


def without(*names: str):
    """A folder in which these files are missing."""

    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("config.json"), "has no model: config.json is missing"),
        (without("model.safetensors"), "has no weights: there is no .safetensors file$"),
        (pickled_weights, "has no weights.*only pickled weights"),
        (an_adapter, "LoRA adapter, not a model; merge it first.*--merge_lora"),
    ],
    ids=["no config", "no weights", "only .bin", "adapter"],
)
def test_incomplete_model_folder_error_says_what_is_missing(damage, message, model_dir, cache_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "broken")
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        find(folder, cache_dir)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "../model", "~/no/such/model", "a/b/c", "some.gguf"])
def test_missing_path_is_named_in_full(name, cache_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absolute = Path(name).expanduser().absolute()
    with pytest.raises(ModelError, match=f"there is no model at {re.escape(str(absolute))}"):
        find(name, cache_dir)


def test_other_file_types_are_refused(model_dir, cache_dir):
    with pytest.raises(ModelError, match="model.safetensors is a file of another type"):
        find(model_dir / "model.safetensors", cache_dir)


def test_model_in_the_hub_cache_is_found_offline(hub_cache, model_dir, cache_dir):
    folder = cached_model(hub_cache, model_dir)
    found = find(HUB_NAME, cache_dir)
    assert (found.folder, found.name, found.notice) == (folder, HUB_NAME, None)


@pytest.mark.parametrize(
    ("leave_out", "message"), [("*.safetensors", "has no weights"), ("config.json", "config.json is missing")]
)
def test_incomplete_download_is_refused(leave_out, message, hub_cache, model_dir, cache_dir):
    cached_model(hub_cache, model_dir, leave_out=leave_out)
    with pytest.raises(ModelError, match=message):
        find(HUB_NAME, cache_dir)


@pytest.mark.parametrize("name", [HUB_NAME, "gpt2"])
def test_unreachable_hub_model_error_says_what_to_do(name, hub_cache, cache_dir):
    message = f"^{name} is neither a folder here nor in the hub's cache, and the hub cannot be reached.*Name another"
    with pytest.raises(ModelError, match=message) as caught:
        find(name, cache_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["my model", "a-lab/", "-model-", "a..b"])
def test_name_that_is_neither_folder_nor_hub_id_is_refused(name, hub_cache, cache_dir):
    with pytest.raises(ModelError, match=f"'{name}' is not a folder here, and not a valid hub id"):
        find(name, cache_dir)


def answer(kind: type, status: int) -> Exception:
    return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://hub")))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (answer(GatedRepoError, 403), f"{HUB_NAME} is gated: accept its terms.*hf auth login"),
        (answer(RepositoryNotFoundError, 404), f"the hub has no model {HUB_NAME}"),
        (LocalEntryNotFoundError("not cached"), r"cannot be reached \(not cached\)"),
        (httpx.ConnectError("no route"), r"cannot be reached \(no route\)"),
        (httpx.ProxyError("407"), r"cannot be reached \(407\)"),
        (httpx.ReadError("broken off\nand more"), r"cannot be reached \(broken off\)"),
        (httpx.ReadTimeout(""), r"cannot be reached \(ReadTimeout\)"),
        (ConnectionResetError("reset"), r"cannot be reached \(reset\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_hub_failure_is_a_model_error(failure, message, cache_dir, monkeypatch):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=message):
        find(HUB_NAME, cache_dir)


@pytest.mark.parametrize("trust", [False, True])
def test_code_is_downloaded_only_if_trusted_and_pickles_never(trust, model_dir, cache_dir, monkeypatch):
    is_downloaded = downloads(model_dir, monkeypatch)
    find(HUB_NAME, cache_dir, trust_remote_code=trust)
    assert (
        is_downloaded("config.json")
        and is_downloaded("model-00001-of-00002.safetensors")
        and is_downloaded("tokenizer.json")
    )
    assert is_downloaded("modeling.py") is trust
    assert not is_downloaded("pytorch_model.bin") and not is_downloaded("original/consolidated.safetensors")


def test_fallback_replaces_an_unreachable_default_model_with_a_notice(hub_cache, model_dir, cache_dir):
    found = find(HUB_NAME, cache_dir, fallback=str(model_dir))
    assert (found.folder, found.name) == (model_dir, str(model_dir))
    assert HUB_NAME in found.notice and str(model_dir) in found.notice and "--model" in found.notice


def test_fallback_is_not_used_if_the_model_is_available(hub_cache, model_dir, cache_dir):
    folder = cached_model(hub_cache, model_dir)
    found = find(HUB_NAME, cache_dir, fallback="/no/such/model")
    assert (found.folder, found.name, found.notice) == (folder, HUB_NAME, None)


@pytest.mark.parametrize("name", [HUB_NAME, "/no/such/model"])
def test_model_without_fallback_is_never_replaced(name, hub_cache, cache_dir, conversions):
    with pytest.raises(ModelError, match=name):
        find(name, cache_dir, fallback=None)
    assert conversions == []


def test_missing_fallback_is_an_error(hub_cache, cache_dir):
    with pytest.raises(ModelError, match="/no/such/model"):
        find(HUB_NAME, cache_dir, fallback="/no/such/model")


@pytest.fixture
def tokenizer_dir(tmp_path, tokenizer) -> Path:
    """A tokenizer and nothing else."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def find_tokenizer(model: Path, tokenizer_path: str | Path | None, cache_dir: Path) -> Path:
    path = None if tokenizer_path is None else str(tokenizer_path)
    config = ModelConfig(path=str(model), tokenizer_path=path, fallback=None)
    return resolve_tokenizer(config, resolve_model(config, cache_dir), cache_dir)


def test_tokenizer_is_the_models_unless_another_is_named(model_dir, tokenizer_dir, cache_dir):
    assert find_tokenizer(model_dir, None, cache_dir) == model_dir
    assert find_tokenizer(model_dir, tokenizer_dir, cache_dir) == tokenizer_dir


def test_tokenizer_of_another_model_is_that_models_folder(model_dir, cache_dir, tmp_path):
    other = tiny.build_model(tmp_path / "other")
    assert find_tokenizer(model_dir, other, cache_dir) == other


def test_fallback_uses_its_own_tokenizer(hub_cache, model_dir, cache_dir):
    config = ModelConfig(path=HUB_NAME, fallback=str(model_dir))
    assert resolve_tokenizer(config, resolve_model(config, cache_dir), cache_dir) == model_dir


def test_tokenizer_is_found_in_the_hub_cache_without_weights(hub_cache, model_dir, cache_dir):
    folder = cached_model(hub_cache, model_dir, leave_out="*.safetensors")
    assert find_tokenizer(model_dir, HUB_NAME, cache_dir) == folder


def test_tokenizer_download_excludes_weights(model_dir, tokenizer_dir, cache_dir, monkeypatch):
    is_downloaded = downloads(tokenizer_dir, monkeypatch)
    assert find_tokenizer(model_dir, HUB_NAME, cache_dir) == tokenizer_dir
    assert is_downloaded("tokenizer.json") and is_downloaded("chat_template.jinja") and is_downloaded("tokenizer.model")
    assert not is_downloaded("model.safetensors")


@pytest.mark.parametrize("name", ["/no/such/tokenizer", HUB_NAME])
def test_missing_tokenizer_is_an_error(name, hub_cache, model_dir, cache_dir):
    with pytest.raises(ModelError, match=name):
        find_tokenizer(model_dir, name, cache_dir)
