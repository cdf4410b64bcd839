"""Files, globs, shares and hub data sets resolve to sources; unusable files are reported."""

import os
from pathlib import Path

import pytest

from sft_recipe.data.formats import read_conversations
from sft_recipe.data.sources import resolve_files
from sft_recipe.errors import DataError
from tests.data.files import files_error, paths_of, raw


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.json", "a.json", "c.jsonl", "x, y.json", "notes.txt", "w[1].json"):
        raw(Path(name), "[1]")
    Path("empty.csv").touch()
    Path("sub.json").mkdir()
    return tmp_path


def test_file_glob_and_list(folder):
    assert paths_of("b.json") == paths_of(Path("b.json")) == [Path("b.json")]
    assert paths_of("[ab].json") == [Path("a.json"), Path("b.json")]
    assert paths_of(["c.jsonl", Path("b.json"), "a.js*"]) == [
        Path("c.jsonl"),
        Path("b.json"),
        Path("a.json"),
    ]
    assert paths_of("x, y.json") == [Path("x, y.json")]
    assert paths_of("w[1].json") == [Path("w[1].json")]
    assert paths_of(str(folder / "?.json")) == [folder / "a.json", folder / "b.json"]


def test_glob_is_sorted_whatever_order_the_disk_has(folder, monkeypatch):
    monkeypatch.setattr("glob.glob", lambda *args, **kwargs: ["b.json", "c.jsonl", "a.json"])
    assert paths_of("*.json*") == [Path("a.json"), Path("b.json"), Path("c.jsonl")]


def test_home_and_recursive_globs(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert paths_of("~/a.json") == [folder / "a.json"]
    raw(folder / "sub.json" / "a.json", "[1]")
    assert paths_of("**/a.json") == [Path("a.json"), Path("sub.json/a.json")]


def test_missing_file_error_lists_similar_names(folder):
    message = files_error(["a.json", "c.json"])
    assert f"not found: {folder / 'c.json'};" in message and "c.jsonl" in message
    assert f"there is no folder {folder / 'gone'}" in files_error("gone/a.json")


@pytest.mark.parametrize("share", ["*-1", "*nan", "*1e9", "*x", "#-1", "#1.5", "#"])
def test_a_share_that_is_no_number_is_named(folder, share):
    (folder / "a.json.jsonl").write_text("[1]")
    assert f"a.json{share}: {share.split('*')[-1].lstrip('#')!r} is no share of a.json" in files_error(f"a.json{share}")
    assert [path.name for path in resolve_files("a.json*l")[0].files] == ["a.json.jsonl"]


def test_glob_that_matches_nothing(folder):
    for pattern in ("q*.json", "sub*"):  # a folder is no match
        assert f"No file matches {folder / pattern}" in files_error(pattern)


def test_directory(folder):
    message = files_error(".")
    assert "a directory (with a.json, b.json, c.jsonl, empty.csv, sub.json)" in message
    assert "sub.json: a directory (with no data files)" in files_error("sub.json")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("empty.csv", "empty.csv: the file is empty"),
        ("notes.txt", "notes.txt: plain text has no fields for prompt and response"),
        (["a.json", "./sub.json/../a.json"], "the file is given twice"),
        (["b.json", "?.json"], "b.json: the file is given twice"),
        ([], "No data file is given"),
    ],
)
def test_unusable_files(folder, spec, expected):
    assert expected in files_error(spec)


def test_link_to_the_same_file_is_the_same_file(folder):
    Path("link.json").symlink_to("a.json")
    assert "link.json: the file is given twice" in files_error(["a.json", "link.json"])


def test_unreadable_file(folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a mode of 0 does not stop root
    assert "a.json: no permission to read" in files_error("a.json")


def test_read_conversations_checks_the_file_too(folder):
    for name, expected in {
        "empty.csv": "is empty",
        "sub.json": "a directory",
        "notes.txt": "plain text",
    }.items():
        with pytest.raises(DataError, match=expected):
            read_conversations(name)


@pytest.mark.parametrize(
    ("spec", "wanted"), [("a.json", 10), ("a.json*0.5", 5), ("a.json*2", 20), ("a.json*.01", 1), ("a.json#7", 7)]
)
def test_share_of_a_file(tmp_path, monkeypatch, spec, wanted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text("[1]")
    (source,) = resolve_files(spec)
    assert [file.name for file in source.files] == ["a.json"] and source.name == "a.json"
    assert source.target_count(10) == wanted


def test_glob_has_one_share_and_existing_names_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json", "b.json*2"):
        (tmp_path / name).write_text("[1]")
    glob = resolve_files("?.json*0.5")[0]
    assert [file.name for file in glob.files] == ["a.json", "b.json"] and glob.weight == 0.5
    with pytest.raises(DataError, match="unknown file type"):
        resolve_files("b.json*2")
    for nothing in ("a.json*0", "a.json#0"):
        with pytest.raises(DataError, match="asks for no examples of a.json"):
            resolve_files(nothing)


def test_hub_data_set_becomes_a_file(tmp_path, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}])
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    (source,) = resolve_files("owner/name:train[:10]#1", tmp_path / "cache")
    assert asked == [("owner/name", "train[:10]")] and source.count == 1
    assert [c.messages[0].content for c in read_conversations(source.files[0])] == ["a", "c"]
    assert resolve_files("owner/name", tmp_path / "cache")[0].files == source.files
    assert asked[1] == ("owner/name", "train")


def test_unreachable_hub_data_set_is_reported(tmp_path, monkeypatch):
    import datasets

    def load_dataset(name, split):
        raise ConnectionError("Couldn't reach the hub\nin five attempts")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"owner/name \(split train\) is neither a file .* \(Couldn't reach the hub\)"):
        resolve_files("owner/name", tmp_path / "cache")


@pytest.mark.parametrize("share", ["#999999999999", "#100000001", "*100000001", f"*{'9' * 400}", f"#{'9' * 5000}"])
def test_a_share_that_cannot_be_planned_is_refused_before_the_files_are_read(folder, share):
    message = files_error(f"a.json{share}")
    assert message.startswith("a.json: its share asks for more than 100,000,000 examples per epoch")


def test_a_weight_is_refused_where_it_makes_too_many_examples(folder):
    [times_60] = resolve_files("a.json*60")
    assert times_60.target_count(1_000_000) == 60_000_000
    with pytest.raises(DataError, match="a.json: its share asks for more than 100,000,000 examples per epoch"):
        times_60.target_count(2_000_000)
    [hundred_million] = resolve_files("a.json#100000000")
    assert hundred_million.target_count(7) == 100_000_000
    [everything] = resolve_files("b.json")
    assert everything.target_count(300_000_000) == 300_000_000  # the data itself may be larger
