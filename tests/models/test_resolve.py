"""Where a model comes from: folder, GGUF file, hub cache, the embedded one; and what is said where it is nowhere."""

import re
import shutil
from importlib.metadata import PackageNotFoundError
from multiprocessing import get_context
from pathlib import Path, PurePosixPath

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_recipe.config.schema import ModelConfig
from sft_recipe.errors import ModelError
from sft_recipe.models import resolve as models
from sft_recipe.models.resolve import (
    EMBEDDED,
    EMBEDDED_INSTALL,
    convert_gguf,
    embedded_gguf,
    resolve_model,
    resolve_tokenizer,
)
from tests.support import tiny

HUB_NAME = "a-lab/a-model"


@pytest.fixture
def cache_dir(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache; the hub itself is out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached_model(hub_cache: Path, model_dir: Path, name: str = HUB_NAME, leave_out: str = "") -> Path:
    """Lay a model into the hub cache as a download does."""
    repository = hub_cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd" * 5)
    return shutil.copytree(
        model_dir, repository / "snapshots" / ("0123abcd" * 5), ignore=shutil.ignore_patterns(leave_out)
    )


@pytest.fixture
def conversions(monkeypatch) -> list[Path]:
    """Conversion in name only; the list grows by each file that is converted."""
    converted: list[Path] = []

    def write(source: Path, target: Path) -> None:
        converted.append(source)
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(models, "_write_converted", write)
    return converted


def find(path: str | Path, cache_dir: Path, **settings) -> models.ResolvedModel:
    return resolve_model(ModelConfig(path=str(path), **settings), cache_dir)


# Folders


def test_a_folder_is_taken_where_it_stands(model_dir, cache_dir):
    found = find(model_dir, cache_dir)
    assert (found.folder, found.name, found.notice) == (model_dir, str(model_dir), None)
    assert not cache_dir.exists()


@pytest.mark.parametrize("name", ["~/my/model", "./my/model", "my/model"])
def test_a_folder_may_be_named_from_home_or_from_here(name, model_dir, cache_dir, tmp_path, monkeypatch):
    """`my/model` could be a hub id; what is there comes first."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, tmp_path / "my" / "model")
    found = find(name, cache_dir)
    assert found.folder.samefile(tmp_path / "my" / "model")
    assert found.name == name


def without(*names: str):
    """A folder in which these files are missing."""

    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("config.json"), "holds no model: config.json is missing"),
        (without("model.safetensors"), "holds no weights: there is no .safetensors file$"),
        (pickled_weights, "holds no weights.*only pickled weights, which are not loaded"),
        (an_adapter, "LoRA adapter, not a model; merge it first.*--merge_lora"),
    ],
    ids=["no config", "no weights", "only .bin", "adapter"],
)
def test_a_folder_that_is_no_model_says_what_is_missing(spoil, message, model_dir, cache_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "broken")
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        find(folder, cache_dir)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "../model", "~/no/such/model", "a/b/c", "some.gguf"])
def test_a_path_where_nothing_is_is_named_in_full(name, cache_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = Path(name).expanduser().absolute()
    with pytest.raises(ModelError, match=f"there is no model at {re.escape(str(place))}"):
        find(name, cache_dir)


def test_a_file_that_is_no_gguf_is_refused_by_its_name(model_dir, cache_dir):
    with pytest.raises(ModelError, match="model.safetensors is a file, but no .gguf file"):
        find(model_dir / "model.safetensors", cache_dir)


# The hub


def test_a_model_in_the_hub_cache_is_found_offline(hub_cache, model_dir, cache_dir):
    folder = cached_model(hub_cache, model_dir)
    found = find(HUB_NAME, cache_dir)
    assert (found.folder, found.name, found.notice) == (folder, HUB_NAME, None)


@pytest.mark.parametrize(
    ("leave_out", "message"), [("*.safetensors", "holds no weights"), ("config.json", "config.json is missing")]
)
def test_a_download_that_was_broken_off_is_no_model(leave_out, message, hub_cache, model_dir, cache_dir):
    cached_model(hub_cache, model_dir, leave_out=leave_out)
    with pytest.raises(ModelError, match=message):
        find(HUB_NAME, cache_dir)


@pytest.mark.parametrize("name", [HUB_NAME, "gpt2"])
def test_a_hub_model_out_of_reach_says_what_to_do(name, hub_cache, cache_dir):
    message = f"^{name} is neither a folder here nor in the hub's cache, and the hub cannot be reached.*--model"
    with pytest.raises(ModelError, match=message) as caught:
        find(name, cache_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["my model", "a-lab/", "-model-", "a..b"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(name, hub_cache, cache_dir):
    with pytest.raises(ModelError, match=f"'{name}' is no folder here, and cannot be a hub id"):
        find(name, cache_dir)


def answer(kind: type, status: int) -> Exception:
    return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://hub")))


@pytest.mark.parametrize(
    ("trouble", "message"),
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
def test_whatever_goes_wrong_on_the_way_to_the_hub_is_one_clear_error(trouble, message, cache_dir, monkeypatch):
    def fail(*_, **__):
        raise trouble

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=message):
        find(HUB_NAME, cache_dir)


@pytest.mark.parametrize("trust", [False, True])
def test_code_is_downloaded_only_where_it_is_trusted_and_pickles_never(trust, model_dir, cache_dir, monkeypatch):
    wanted = downloads(model_dir, monkeypatch)
    find(HUB_NAME, cache_dir, trust_remote_code=trust)
    assert wanted("config.json") and wanted("model-00001-of-00002.safetensors") and wanted("tokenizer.json")
    assert wanted("modeling.py") is trust
    assert not wanted("pytorch_model.bin") and not wanted("original/consolidated.safetensors")


def downloads(folder: Path, monkeypatch):
    """Stand in for the hub; what is returned tells whether a file would have been downloaded."""
    asked: dict[str, list[str]] = {}

    def download(name, *, allow_patterns, ignore_patterns, **_):
        asked.update(allow=allow_patterns, ignore=ignore_patterns)
        return str(folder)

    def wanted(file: str) -> bool:
        kept = huggingface_hub.utils.filter_repo_objects(
            [file], allow_patterns=asked["allow"], ignore_patterns=asked["ignore"]
        )
        return list(kept) == [file]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return wanted


# The fallback


def test_the_fallback_stands_in_for_a_default_model_out_of_reach_and_says_so(hub_cache, model_dir, cache_dir):
    found = find(HUB_NAME, cache_dir, fallback=str(model_dir))
    assert (found.folder, found.name) == (model_dir, str(model_dir))
    assert HUB_NAME in found.notice and str(model_dir) in found.notice and "--model" in found.notice


def test_the_fallback_is_not_taken_where_the_model_is_there(hub_cache, model_dir, cache_dir):
    folder = cached_model(hub_cache, model_dir)
    found = find(HUB_NAME, cache_dir, fallback="/no/such/model")
    assert (found.folder, found.name, found.notice) == (folder, HUB_NAME, None)


@pytest.mark.parametrize("name", [HUB_NAME, "/no/such/model"])
def test_without_a_fallback_a_model_is_never_replaced(name, hub_cache, cache_dir, conversions):
    with pytest.raises(ModelError, match=name):
        find(name, cache_dir, fallback=None)
    assert conversions == []


def test_a_fallback_that_is_missing_too_is_an_error(hub_cache, cache_dir):
    with pytest.raises(ModelError, match="/no/such/model"):
        find(HUB_NAME, cache_dir, fallback="/no/such/model")


# The embedded model


@pytest.mark.parametrize("name", [EMBEDDED, EMBEDDED.lower(), f"HuggingFaceTB/{EMBEDDED}"])
def test_the_embedded_model_goes_by_its_name(name, cache_dir, conversions):
    found = find(name, cache_dir)
    assert conversions == [embedded_gguf()]
    assert found.folder.parent == cache_dir / "models"
    assert found.name == name


def test_a_folder_with_the_embedded_models_name_comes_first(model_dir, cache_dir, tmp_path, monkeypatch, conversions):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, tmp_path / EMBEDDED)
    assert find(EMBEDDED, cache_dir).folder.samefile(tmp_path / EMBEDDED)
    assert conversions == []


@pytest.mark.parametrize("settings", [{"path": EMBEDDED}, {"path": HUB_NAME, "fallback": EMBEDDED}])
def test_without_its_package_the_error_says_how_to_install_it(settings, hub_cache, cache_dir, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(models, "distribution", missing)
    with pytest.raises(ModelError, match=f"{EMBEDDED} is not installed; run: {EMBEDDED_INSTALL}$"):
        find(cache_dir=cache_dir, **settings)


class Listed(PurePosixPath):
    """A file of a package, as its metadata lists it."""

    def locate(self):
        return Path("/site-packages") / self


@pytest.mark.parametrize("files", [None, [], [Listed("llm/__init__.py")], [Listed("llm/deleted.gguf")]])
def test_a_package_without_its_file_is_to_be_installed_anew(files, cache_dir, monkeypatch):
    class Package:
        pass

    Package.files = files
    monkeypatch.setattr(models, "distribution", lambda _: Package)
    with pytest.raises(ModelError, match=f"no .gguf file; run: {EMBEDDED_INSTALL} --force-reinstall"):
        find(EMBEDDED, cache_dir)


@pytest.mark.slow
def test_the_embedded_model_converts_once_and_answers(cache_dir, monkeypatch):
    """The real thing, from its package: about 25 seconds."""
    found = find(EMBEDDED, cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    model = AutoModelForCausalLM.from_pretrained(found.folder)
    for part in ("bos", "eos", "pad"):
        token_id = getattr(model.config, f"{part}_token_id")
        assert token_id is not None
        assert getattr(tokenizer, f"{part}_token_id") == token_id
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.clean_up_tokenization_spaces is False
    assert model.dtype == torch.bfloat16

    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    spoken = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(spoken)

    def again(*_):
        raise AssertionError("converted a second time")

    monkeypatch.setattr(models, "_write_converted", again)
    assert find(embedded_gguf(), cache_dir).folder == found.folder


# Conversion


@pytest.fixture
def gguf(tmp_path) -> Path:
    path = tmp_path / "Some-2.5-0.5B-Q4.gguf"
    path.write_bytes(b"weights")
    return path


def test_a_file_is_converted_once_wherever_it_lies(gguf, cache_dir, conversions):
    first = find(gguf, cache_dir)
    assert first.name == str(gguf) and first.folder.is_relative_to(cache_dir)
    moved = gguf.rename(gguf.with_name("elsewhere.gguf")).rename(gguf)
    assert find(moved, cache_dir).folder == first.folder
    assert conversions == [gguf]


def test_other_contents_under_the_same_name_are_another_model(gguf, cache_dir, conversions):
    first = convert_gguf(gguf, cache_dir)
    gguf.write_bytes(b"better weights")
    assert convert_gguf(gguf, cache_dir) != first
    assert len(conversions) == 2


def test_a_new_way_to_convert_does_not_reuse_the_old_result(gguf, cache_dir, conversions, monkeypatch):
    first = convert_gguf(gguf, cache_dir)
    monkeypatch.setattr(models, "CONVERSION", "another")
    assert convert_gguf(gguf, cache_dir) != first


@pytest.mark.parametrize(
    "contents",
    [b"", b"GGUF", b"this is no model " * 100, b"GGUF\x03\x00\x00\x00" + b"\x01\x00\x00\x00\x00\x00\x00\x00" * 4],
    ids=["empty", "four bytes", "noise", "cut"],
)
def test_a_gguf_file_that_is_none_is_refused(contents, gguf, cache_dir):
    gguf.write_bytes(contents)
    with pytest.raises(ModelError, match=f"{gguf.name} cannot be converted: ."):
        find(gguf, cache_dir)
    assert folders(cache_dir) == []


def folders(cache_dir: Path) -> list[str]:
    return [path.name for path in (cache_dir / "models").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "trouble",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")],
    ids=lambda trouble: type(trouble).__name__,
)
def test_a_conversion_that_fails_in_the_middle_leaves_nothing(trouble, gguf, cache_dir, conversions, monkeypatch):
    write = models._write_converted

    def fill_the_disk(source, target):
        write(source, target)
        raise trouble

    monkeypatch.setattr(models, "_write_converted", fill_the_disk)
    with pytest.raises(ModelError, match=f"{gguf.name} cannot be converted into .*No space left"):
        convert_gguf(gguf, cache_dir)
    assert folders(cache_dir) == []
    monkeypatch.setattr(models, "_write_converted", write)
    assert (convert_gguf(gguf, cache_dir) / "config.json").is_file()


def test_what_a_killed_conversion_left_is_done_anew(gguf, cache_dir, conversions):
    """Killed just before the end: all is there but the name."""
    target = convert_gguf(gguf, cache_dir)
    (target / "stale").touch()
    target.rename(target.with_name(f"{target.name}.partial"))
    assert convert_gguf(gguf, cache_dir) == target
    assert not (target / "stale").exists()
    assert folders(cache_dir) == [target.name]


def test_a_cache_folder_that_cannot_be_written_is_one_clear_error(gguf, cache_dir, conversions):
    cache_dir.write_text("a file where a folder belongs")
    with pytest.raises(ModelError, match=f"cannot be converted into {cache_dir / 'models'}: "):
        find(gguf, cache_dir)


def test_two_conversions_at_once_are_one(gguf, cache_dir, tmp_path, monkeypatch):
    """The second waits for the first, then takes what it made."""
    fork = get_context("fork")
    ready = fork.Barrier(2)
    log = tmp_path / "log"

    def write(source: Path, target: Path) -> None:
        target.mkdir()
        with log.open("a") as file:
            file.write("converted\n")
        fork.Event().wait(0.3)
        (target / "config.json").write_text("{}")

    def convert() -> None:
        ready.wait(timeout=600)
        assert (convert_gguf(gguf, cache_dir) / "config.json").is_file()

    monkeypatch.setattr(models, "_write_converted", write)
    converters = [fork.Process(target=convert) for _ in range(2)]
    for converter in converters:
        converter.start()
    for converter in converters:
        converter.join(timeout=600)
    assert [converter.exitcode for converter in converters] == [0, 0]
    assert log.read_text() == "converted\n"


# The tokenizer


@pytest.fixture
def tokenizer_dir(tmp_path, tokenizer) -> Path:
    """A tokenizer and nothing else."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def find_tokenizer(model: Path, tokenizer_path: str | Path | None, cache_dir: Path) -> Path:
    path = None if tokenizer_path is None else str(tokenizer_path)
    config = ModelConfig(path=str(model), tokenizer_path=path)
    return resolve_tokenizer(config, resolve_model(config, cache_dir), cache_dir)


def test_the_tokenizer_is_the_models_own_unless_another_is_named(model_dir, tokenizer_dir, cache_dir):
    assert find_tokenizer(model_dir, None, cache_dir) == model_dir
    assert find_tokenizer(model_dir, tokenizer_dir, cache_dir) == tokenizer_dir


def test_the_tokenizer_of_another_model_is_that_models_folder(model_dir, cache_dir, tmp_path):
    other = tiny.build_model(tmp_path / "other")
    assert find_tokenizer(model_dir, other, cache_dir) == other


def test_a_fallback_brings_its_own_tokenizer(hub_cache, model_dir, cache_dir):
    config = ModelConfig(path=HUB_NAME, fallback=str(model_dir))
    assert resolve_tokenizer(config, resolve_model(config, cache_dir), cache_dir) == model_dir


def test_a_tokenizer_is_found_in_the_hub_cache_without_the_models_weights(hub_cache, model_dir, cache_dir):
    folder = cached_model(hub_cache, model_dir, leave_out="*.safetensors")
    assert find_tokenizer(model_dir, HUB_NAME, cache_dir) == folder


def test_for_a_tokenizer_no_weights_are_downloaded(model_dir, tokenizer_dir, cache_dir, monkeypatch):
    wanted = downloads(tokenizer_dir, monkeypatch)
    assert find_tokenizer(model_dir, HUB_NAME, cache_dir) == tokenizer_dir
    assert wanted("tokenizer.json") and wanted("chat_template.jinja") and wanted("tokenizer.model")
    assert not wanted("model.safetensors")


@pytest.mark.parametrize("name", ["/no/such/tokenizer", HUB_NAME])
def test_a_tokenizer_that_is_not_there_is_an_error(name, hub_cache, model_dir, cache_dir):
    with pytest.raises(ModelError, match=name):
        find_tokenizer(model_dir, name, cache_dir)
