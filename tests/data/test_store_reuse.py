"""A token store is reused if nothing has changed, and rebuilt after a change or damage."""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from sft_recipe.data import pipeline, token_store
from sft_recipe.data.pipeline import open_store
from sft_recipe.data.rendering.renderer import RenderOptions
from sft_recipe.data.token_store import StoreOptions, TokenStore, code_of_stores
from tests.data.stores import FILES, RECORDS, build, encoded, examples, store_names, write
from tests.support import tiny
from tests.support.runs import ROOT


@pytest.fixture
def no_building(monkeypatch):
    """Call it to make every further build an error."""

    def refuse(*_):
        raise AssertionError("the store was built again")

    return lambda: monkeypatch.setattr(pipeline, "build_store", refuse)


@pytest.mark.parametrize("change", ["nothing", "touched", "moved"])
def test_store_is_reused_if_contents_are_unchanged(change, data, tokenizer, cache_dir, no_building):
    first = build(data, tokenizer, cache_dir)
    no_building()
    if change == "touched":
        os.utime(data, (1, 1))
    if change == "moved":
        data = data.rename(data.with_name("renamed.json"))
    second = build(data, tokenizer, cache_dir)
    assert second.folder == first.folder
    assert examples(second) == examples(first)
    assert second.report == first.report


def test_store_is_reused_by_a_reloaded_tokenizer(data, cache_dir, tmp_path, no_building):
    """One whose file asks for truncation and padding forgets that on first use."""
    tokenizer = tiny.build_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def loaded():
        return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")

    used = loaded()
    used("Hello there, how are you today?")
    first = build(data, used, cache_dir)
    assert examples(first) == encoded(tiny.build_tokenizer(), data)
    no_building()
    assert build(data, loaded(), cache_dir).folder == first.folder


def edited_file(data, tokenizer, options):
    write(data, [*RECORDS[:-1], {**RECORDS[-1], "response": "4"}])
    return tokenizer, options


def other_vocabulary(data, tokenizer, options):
    return tiny.build_tokenizer(vocab_size=400), options


def an_added_token(data, tokenizer, options):
    tokenizer.add_tokens(["Paris"])
    return tokenizer, options


def other_chat_template(data, tokenizer, options):
    tokenizer.chat_template = "{{ 'Be brief. ' }}" + tiny.CHATML
    return tokenizer, options


def other_special_tokens(data, tokenizer, options):
    """The vocabulary is the same; a template may show eos_token."""
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer, options


def special_token_for_the_renderer(data, tokenizer, options):
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("Paris.", special=True)]})
    return tokenizer, options


def other_max_length(data, tokenizer, options):
    return tokenizer, replace(options, max_length=60)


def other_truncation(data, tokenizer, options):
    return tokenizer, replace(options, truncation="right")


def other_format(data, tokenizer, options):
    return tokenizer, replace(options, format="prompt_response")


def other_columns(data, tokenizer, options):
    return tokenizer, replace(options, columns={"prompt": "prompt"})


def other_roles(data, tokenizer, options):
    return tokenizer, replace(options, roles={"Agent": "assistant"})


def bad_records_skipped(data, tokenizer, options):
    return tokenizer, replace(options, on_bad_record="skip")


def other_turns(data, tokenizer, options):
    return tokenizer, replace(options, render=RenderOptions(train_on="last"))


def special_text_allowed(data, tokenizer, options):
    return tokenizer, replace(options, render=RenderOptions(parse_special_tokens=True))


CHANGES = [
    other_columns,
    other_roles,
    bad_records_skipped,
    other_turns,
    special_text_allowed,
    edited_file,
    other_vocabulary,
    an_added_token,
    other_chat_template,
    other_special_tokens,
    special_token_for_the_renderer,
    other_max_length,
    other_truncation,
    other_format,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_store_is_rebuilt_after_a_change(change, data, cache_dir):
    tokenizer, options = tiny.build_tokenizer(), StoreOptions(max_length=80)
    first = open_store([data], tokenizer, options, cache_dir, workers=1)
    old = examples(first)
    tokenizer, options = change(data, tokenizer, options)
    second = open_store([data], tokenizer, options, cache_dir, workers=1)
    assert second.folder != first.folder
    limit, cuts = options.max_length, options.truncation == "right"
    fresh = [(ids[:limit], mask[:limit]) for ids, mask in encoded(tokenizer, data) if cuts or len(ids) <= limit]
    assert examples(second) == fresh
    assert examples(TokenStore.open(first.folder)) == old


def test_key_depends_on_code_and_library_versions(data, tokenizer, monkeypatch):
    def key():
        return token_store.store_key([data], tokenizer, StoreOptions())

    first = key()
    assert key() == first
    monkeypatch.setattr(token_store.transformers, "__version__", "0")
    assert key() != first
    monkeypatch.undo()
    read_bytes = Path.read_bytes
    for module in ("formats", "renderer", "mask_plan"):
        monkeypatch.setattr(
            Path, "read_bytes", lambda path, module=module: read_bytes(path) + b"#" * (path.name == f"{module}.py")
        )
        assert key() != first, module
        monkeypatch.undo()


def test_key_depends_on_file_boundaries(tokenizer, tmp_path):
    def key(*texts):
        files = [tmp_path / f"{number}.jsonl" for number in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_text(text)
        return token_store.store_key(files, tokenizer, StoreOptions())

    assert len({key("ab", "c"), key("a", "bc"), key("abc"), key("abc", ""), key("c", "ab")}) == 5


def cut_to_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_by_one_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_by_one_token(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


DAMAGES = [Path.unlink, cut_to_half, cut_by_one_byte, cut_by_one_token, cut_to_nothing]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_store_is_rebuilt(damage, name, data, tokenizer, cache_dir):
    folder = build(data, tokenizer, cache_dir).folder
    damage(folder / name)
    with pytest.raises(token_store.DAMAGE):
        TokenStore.open(folder)
    store = build(data, tokenizer, cache_dir)
    assert examples(store) == encoded(tokenizer, data)
    assert examples(TokenStore.open(folder)) == examples(store)
    assert store_names(cache_dir) == [folder.name]


@pytest.mark.parametrize("name", ["store.json", "offsets.npy", "supervised.npy"])
def test_store_with_random_metadata_is_rebuilt(name, data, tokenizer, cache_dir):
    folder = build(data, tokenizer, cache_dir).folder
    (folder / name).write_bytes(b"\xff" * (folder / name).stat().st_size)
    assert examples(build(data, tokenizer, cache_dir)) == encoded(tokenizer, data)


@pytest.mark.parametrize("text", ["null", "[]", "{}", '{"of": "a later version"}'])
def test_store_with_an_unknown_report_is_rebuilt(text, data, tokenizer, cache_dir):
    folder = build(data, tokenizer, cache_dir).folder
    (folder / "store.json").write_text(text)
    assert examples(build(data, tokenizer, cache_dir)) == encoded(tokenizer, data)


def test_store_with_a_foreign_array_is_rebuilt(data, tokenizer, cache_dir):
    folder = build(data, tokenizer, cache_dir).folder
    np.save(folder / "supervised.npy", np.arange(7))
    assert build(data, tokenizer, cache_dir).supervised.tolist() == [sum(mask) for _, mask in encoded(tokenizer, data)]


def test_only_code_that_decides_what_a_store_contains_is_in_its_key():
    """No module outside the key is imported, directly or not, by those that read, convert and render records."""
    folder = ROOT / "sft_recipe/data"
    in_key = {path.relative_to(folder).with_suffix("").as_posix().replace("/", ".") for path in code_of_stores()}
    pending, reached = (
        ["formats", "columns", "readers", "split_turns", "rendering.renderer", "rendering.source_target"],
        set(),
    )
    while pending:
        name = pending.pop()
        reached.add(name)
        text = (folder / f"{name.replace('.', '/')}.py").read_text()
        found = re.findall(r"(?m)^\s*from sft_recipe\.data\.([\w.]+) import", text)
        pending += [other for other in found if other not in reached]
    assert reached <= in_key
    assert not in_key & {"batching", "notices", "quality", "run_inputs", "sources", "store_eviction", "worker_pool"}
    assert {"tokenize", "pipeline", "store_writer", "token_store", "remarks"} <= in_key
