"""Data that is elsewhere is stored once: URLs through fsspec, and data sets of the hub by a local stand-in."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.feather
import pytest

from sft_recipe.data import remote
from sft_recipe.data.formats import read_conversations
from sft_recipe.data.sources import resolve_files
from sft_recipe.errors import DataError
from tests.data.files import error_of

RECORDS = [{"prompt": f"{n}?", "response": f"{n}."} for n in range(5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def prompts(source):
    return [c.messages[0].content for file in source.files for c in read_conversations(file)]


@pytest.fixture
def bucket():
    """A file system in memory, as a stand-in for s3 and gs."""
    files = fsspec.filesystem("memory")
    for name in ("b.jsonl", "a.jsonl", "other.txt"):
        files.pipe(f"/bucket/{name}", LINES.replace("?", f" of {name}?").encode())
    yield files
    files.rm("/bucket", recursive=True)


def test_a_glob_of_a_bucket_with_a_share(bucket, tmp_path):
    (source,) = resolve_files("memory://bucket/*.jsonl*0.5", tmp_path)
    assert [file.name for file in source.files] == ["a.jsonl", "b.jsonl"] and source.weight == 0.5
    assert prompts(source) == [f"{n} of {name}?" for name in ("a.jsonl", "b.jsonl") for n in range(5)]


def test_a_file_is_read_again_only_where_it_has_changed(bucket, tmp_path, monkeypatch):
    first = resolve_files("memory://bucket/a.jsonl", tmp_path)[0]
    with monkeypatch.context() as context:
        context.setattr(type(bucket), "open", None)
        assert resolve_files("memory://bucket/a.jsonl", tmp_path)[0].files == first.files
    bucket.pipe("/bucket/a.jsonl", (LINES + LINES).encode())
    second = resolve_files("memory://bucket/a.jsonl", tmp_path)[0]
    assert second.files != first.files and len(prompts(second)) == 10 and len(prompts(first)) == 5


def test_a_file_of_a_web_server(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web/a.jsonl").write_text(LINES)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/a.jsonl"
    try:
        (source,) = resolve_files(f"{url}#3", tmp_path / "cache")
        assert source.files[0].name == "a.jsonl" and source.count == 3 and len(prompts(source)) == 5
        (tmp_path / "web/a.jsonl").write_text(LINES * 2)
        assert len(prompts(resolve_files(url, tmp_path / "cache")[0])) == 10
        with pytest.raises(DataError, match=r"missing.jsonl cannot be read"):
            resolve_files(url.replace("a.jsonl", "missing.jsonl"), tmp_path / "cache")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("memory://bucket/none-*.jsonl", "No file matches memory://bucket/none-*.jsonl"),
        ("memory://bucket/none.jsonl", "memory://bucket/none.jsonl cannot be read"),
        ("memory://bucket/other.txt", "plain text has no fields for prompt and response"),
        ("carrier-pigeon://a.jsonl", "Data file not found"),
        ("pigeon://a.jsonl", "pigeon://a.jsonl cannot be read (Protocol not known: pigeon); check the address"),
    ],
)
def test_a_url_that_cannot_be_read_is_one_message(bucket, tmp_path, url, expected):
    with pytest.raises(DataError) as caught:
        resolve_files(url, tmp_path)
    assert expected in str(caught.value)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub; the list has what was asked for."""
    asked = []

    def load_dataset(*names, split, streaming=False):
        asked.append((*names, split, streaming))
        if names[0] == "owner/large" and not streaming:
            raise OSError("Not enough disk space. Needed: 2 TB (download: 1 TB, generated: 1 TB)")
        rows = datasets.Dataset.from_list(RECORDS)
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda name: type("Info", (), {"sha": "0123456789abcdef01"}))
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/name", ("owner/name", "train", False)),
        ("owner/name:test", ("owner/name", "test", False)),
        ("owner/name:test[:10%]*0.5", ("owner/name", "test[:10%]", False)),
        ("owner/name:en-US.v2:test[:10]#3", ("owner/name", "en-US.v2", "test[:10]", False)),
    ],
)
def test_a_data_set_of_the_hub_with_configuration_and_split(hub, tmp_path, name, asked):
    (source,) = resolve_files(name, tmp_path / "cache")
    assert hub == [asked] and prompts(source) == [f"{n}?" for n in range(5)]


def test_configurations_are_stored_in_different_files(hub, tmp_path):
    names = ["owner/name:en:train", "owner/name:zh:train", "owner/name:en:test"]
    files = [resolve_files(name, tmp_path / "cache")[0].files[0] for name in names]
    assert len(set(files)) == 3


def test_a_data_set_that_does_not_fit_the_disk_is_streamed(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "STREAMED_ROWS", 2)
    (source,) = resolve_files("owner/large:en:train", tmp_path / "cache")
    assert hub == [("owner/large", "en", "train", False), ("owner/large", "en", "train", True)]
    assert prompts(source) == [f"{n}?" for n in range(5)]
    assert "0123456789abcdef" in source.files[0].name


@pytest.mark.parametrize("kind", ["stream", "file", "feather"])
def test_arrow_files(tmp_path, kind):
    table, path = pa.Table.from_pylist([{**record, "extra": None} for record in RECORDS]), tmp_path / "a.arrow"
    if kind == "feather":
        pyarrow.feather.write_feather(table, path, compression="zstd")
    else:
        with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    found = list(read_conversations(path))
    assert [c.messages[0].content for c in found] == [f"{n}?" for n in range(5)]
    assert found[4].source == f"{path}, record 5" and found[0].unread == ()


def test_arrow_files_of_datasets(tmp_path):
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    (source,) = resolve_files(str(tmp_path / "saved/*.arrow"))
    assert prompts(source) == [f"{n}?" for n in range(5)]


@pytest.mark.parametrize("content", [b"ARROW1\0\0broken", b"not arrow at all", b"\xff\xff\xff\xff\x10\0\0\0"])
def test_a_damaged_arrow_file_is_an_error(tmp_path, content):
    (tmp_path / "a.arrow").write_bytes(content)
    assert "cannot be read as Arrow after record 0" in error_of(tmp_path / "a.arrow")
