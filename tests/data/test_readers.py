"""Readers handle every file type, compressed or not, and report damage with its position."""

import bz2
import csv
import gzip
import json
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_recipe.data import readers
from sft_recipe.data.formats import read_conversations
from sft_recipe.data.pipeline import read_data
from sft_recipe.data.readers import BadRecord
from sft_recipe.errors import DataError
from tests.data.files import (
    GOOD,
    error_of,
    raw,
    turns_of,
    write,
)


def test_jsonl_skips_blank_lines_and_a_byte_order_mark_and_crlf(tmp_path):
    line = json.dumps(GOOD)
    path = raw(tmp_path / "a.jsonl", f"\ufeff{line}\r\n\r\n   \n{line}")
    assert [c.source for c in read_conversations(path)] == [f"{path}, line 1", f"{path}, line 4"]


@pytest.mark.parametrize("data", ['\ufeff[{"prompt": "a", "response": "b"}]', "\ufeffprompt,response\r\na,b\r\n\r\n"])
def test_byte_order_mark_elsewhere(tmp_path, data):
    path = raw(tmp_path / ("a.csv" if "," in data[:9] else "a.json"), data)
    assert turns_of(path) == [[("user", "a"), ("assistant", "b")]]


def test_json_file_of_lines_is_read_as_lines(tmp_path):
    line = json.dumps(GOOD)
    path = raw(tmp_path / "a.json", f"\n{line}\n\n{line}\n")
    assert [c.source for c in read_conversations(path)] == [f"{path}, line 2", f"{path}, line 4"]


def test_byte_order_mark_inside_a_text_is_kept(tmp_path):
    path = write(tmp_path / "a.csv", [{"prompt": "a\n\ufeffb", "response": "c"}])
    assert turns_of(path) == [[("user", "a\n\ufeffb"), ("assistant", "c")]]


def test_upper_case_suffix(tmp_path):
    assert len(turns_of(raw(tmp_path / "A.JSONL", json.dumps(GOOD)))) == 1


def test_csv_cell_longer_than_the_default_limit(tmp_path):
    path = write(tmp_path / "a.csv", [{"prompt": "x" * 200_000, "response": "y"}])
    assert len(turns_of(path)[0][0][1]) == 200_000


def test_parquet_is_read_over_batches_and_drops_keys_a_row_lacks(tmp_path):
    turns = [
        {"role": "user", "content": "a", "tool_calls": None},
        {"role": "assistant", "content": "b", "x": "y"},
    ]
    path = write(tmp_path / "a.parquet", [{"messages": turns}] * 3000)
    sources = [c.source for c in read_conversations(path)]
    assert len(sources) == 3000 and sources[-1] == f"{path}, record 3000"
    lacking = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}]
    assert "messages[1].content is missing; expected role and content, found role" in error_of(write(path, lacking))


def test_reading_is_lazy_but_the_file_is_checked_at_once(tmp_path):
    first = next(read_conversations(raw(tmp_path / "a.jsonl", json.dumps(GOOD) + "\n{broken")))
    assert first.messages[0].content == "Hi"
    with pytest.raises(DataError, match="not found"):
        read_conversations(tmp_path / "no.json")


@pytest.mark.parametrize(
    ("name", "data", "place", "near"),
    [
        ("a.json", '[\n {"prompt": "a"\n  "response": "b"}\n]', "line 3, column 3", '"response": "b"}'),
        ("a.json", '[\n {"prompt": "a",\n', "line 3, column 1", "the end"),
        ("a.json", '{"prompt": "a" "response": "b"}\n{}', "line 1, column 16", '"response"'),
        ("a.jsonl", '{"a": 1}\n\n{"prompt": oops}\n', "line 3, column 12", "oops}"),
        ("a.jsonl", '\n{"prompt": "a",\n', "line 2, column 16", '{"prompt": "a",'),
        ("a.json", '[{"prompt": "' + "x" * 999 + '" oops "' + "y" * 999 + '"}]', "column 1015", 'x" oops "y'),
    ],
)
def test_malformed_json(tmp_path, name, data, place, near):
    path = raw(tmp_path / name, data.replace('{"a": 1}', json.dumps(GOOD)))
    message = error_of(path)
    assert str(path) in message and place in message and "malformed JSON" in message and near in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("data", "place", "problem"),
    [
        ('prompt,response\na,b\n"c,d\ne,f\n', "line 3", "malformed CSV"),
        ("prompt,response\na,b,c\n", "line 2", "3 cells where the header has 2"),
        ("prompt,response\n\na\n", "line 3", "1 cell where the header has 2"),
        ("question,answer\na,b\n", "line 2", "the fields (question, answer) fit no format"),
    ],
)
def test_malformed_csv(tmp_path, data, place, problem):
    path = raw(tmp_path / "a.csv", data)
    assert error_of(path).startswith(f"{path}, {place}: {problem}")


def test_damaged_parquet(tmp_path):
    complete = write(tmp_path / "a.parquet", [GOOD] * 100).read_bytes()
    broken_text = complete.replace(b"Hello.", b"Hel\xff\xff.")
    for data in (broken_text, complete[:-50], b"PAR1" * 9, complete[:40] + b"\xff" * 40 + complete[80:]):
        path = raw(tmp_path / "b.parquet", data)
        assert error_of(path).startswith(f"{path}: cannot be read as Parquet")


def test_damaged_arrow(tmp_path):
    """Offsets of texts that lead out of them, and a length that is negative: reading those would end the process."""
    texts = pa.array(["a", "b"])
    table = pa.table({"prompt": texts, "response": texts})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    complete = (tmp_path / "a.arrow").read_bytes()
    start = complete.index(struct.pack("<3i", 0, 1, 2))
    for at, value in ((0, -1), (0, 127), (4, 2**31 - 1), (8, 7 * 16**7)):
        damaged = bytearray(complete)
        damaged[start + at : start + at + 4] = struct.pack("<i", value)
        path = raw(tmp_path / "b.arrow", bytes(damaged))
        assert error_of(path).startswith(f"{path}: cannot be read as Arrow after record 0")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_not_utf8_is_named_by_line(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", [{"prompt": "a", "response": "b"}])
    path = raw(path, path.read_bytes().rstrip() + "\n\n你好".encode("gbk"))
    assert error_of(path).startswith(f"{path}, line {4 if suffix == '.csv' else 3}: not UTF-8")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", "[]"),
        ("a.json", " \n"),
        ("a.json", "\ufeff"),
        ("a.jsonl", "\n \n"),
        ("a.csv", "prompt,response\n"),
        ("a.csv", "\n"),
    ],
)
def test_no_records(tmp_path, name, data):
    path = raw(tmp_path / name, data)
    assert error_of(path).startswith(f"{path}: no records")


def test_parquet_without_rows(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    assert error_of(path).startswith(f"{path}: no records")


@pytest.mark.parametrize(
    ("data", "found"),
    [('{"prompt": "a", "response": "b"}', "an object"), ('{\n"a": 1\n}', "an object"), ("3", "a number")],
)
def test_json_without_array_is_refused(tmp_path, data, found):
    path = raw(tmp_path / "a.json", data)
    assert error_of(path).startswith(f"{path}: the file contains {found}; expected an array")


@pytest.mark.parametrize("data", ['[{"prompt": "a"}]', " [\n{}\n]"])
def test_array_in_a_file_of_lines(tmp_path, data):
    path = raw(tmp_path / "a.jsonl", data)
    assert error_of(path).startswith(f"{path}, line 1: an array begins; expected one object per line")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize("codec", [".gz", ".zst"])
def test_compressed_files(tmp_path, suffix, codec):
    texts = {
        ".json": json.dumps([{"prompt": f"问 {n}", "response": "4"} for n in range(50)], indent=1),
        ".jsonl": "".join(json.dumps({"prompt": f"问 {n}", "response": "4"}) + "\n" for n in range(50)),
        ".csv": "prompt,response\n" + "".join(f"问 {n},4\n" for n in range(50)),
    }
    complete = texts[suffix].encode()
    path = tmp_path / f"a{suffix}{codec}"
    squeeze = gzip.compress if codec == ".gz" else lambda data: pa.compress(data, "zstd", asbytes=True)
    half = len(complete) // 2
    path.write_bytes(squeeze(complete[:half]) + squeeze(complete[half:]))  # files of several parts are usual
    assert [c.messages[0].content for c in read_conversations(path)] == [f"问 {n}" for n in range(50)]
    path.write_bytes(squeeze(complete)[:-9])
    with pytest.raises(DataError, match=f"a{suffix}{codec}: cannot be read"):
        list(read_conversations(path))
    path.write_bytes(complete)
    with pytest.raises(DataError, match="cannot be read"):
        list(read_conversations(path))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_with_any_delimiter(tmp_path, delimiter):
    path = tmp_path / "a.csv"
    record = {"prompt": "a, b; c\td|e\nf", "response": "g,h"}
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerows([record.keys(), record.values(), ["x", "y", "z"]])
    (_, found), (_, bad) = readers.read_records(path)
    assert found == record
    name = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}[delimiter]
    assert f"line 4: 3 cells where the header has 2; quote those with {name}" in str(bad.error)


def test_header_of_one_cell_or_with_commas_is_as_it_was(tmp_path):
    assert list(readers.read_records(raw(tmp_path / "a.csv", "prompt\na;b\n")))[0][1] == {"prompt": "a;b"}
    record = {"prompt;x": "a", "response": "b;c"}
    assert list(readers.read_records(raw(tmp_path / "b.csv", "prompt;x,response\na,b;c\n")))[0][1] == record


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": "a", "response": "b"}\r\r{"prompt": "c", "response": "d"}\r'),
        ("a.json", '{"prompt": "a", "response": "b"}\r{"prompt": "c", "response": "d"}'),
        ("a.json", '[\r{"prompt": "a", "response": "b"},\r{"prompt": "c", "response": "d"}\r]'),
        ("a.csv", "prompt,response\ra,b\rc,d\r"),
        ("a.csv", 'prompt,response\ra,"b"\r"c","d"'),
    ],
)
def test_lines_that_end_with_a_carriage_return_alone(tmp_path, name, text):
    assert [[content for _, content in turns] for turns in turns_of(raw(tmp_path / name, text))] == [
        ["a", "b"],
        ["c", "d"],
    ]


def test_carriage_return_inside_a_cell_is_text(tmp_path):
    path = raw(tmp_path / "a.csv", 'prompt,response\n"a\rb","c\r\nd"')
    assert [record for _, record in readers.read_records(path)] == [{"prompt": "a\rb", "response": "c\r\nd"}]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.parquet.gz", b"x", "Parquet is compressed inside and not read in another compression; decompress it"),
        ("a.jsonl.bz2", b"x", ".bz2 files are not read; decompress it, or name and compress it as one of .gz, .zst"),
        ("a.ZIP", b"x", ".ZIP files are not read; decompress it"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "the content is compressed (gzip), but not the name; decompress it"),
        ("a.csv", pa.compress(b"a,b", "zstd", asbytes=True), "the content is compressed (zstd), but not the name"),
        ("a.csv", bz2.compress(b"a,b"), "the content is compressed (bzip2), but not the name"),
    ],
)
def test_other_compression_is_named(tmp_path, name, data, expected):
    path = raw(tmp_path / name, data)
    assert error_of(path).startswith(f"{path}: {expected}")


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("indent", [None, 2])
def test_array_is_read_in_blocks_of_any_size(tmp_path, monkeypatch, block, indent):
    records = [{"prompt": "x" * n + '"\\\n好', "response": str(n), "n": [n, 2.5, None]} for n in range(40)]
    monkeypatch.setattr(readers, "BLOCK", block)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert [record for _, record in readers.read_records(path)] == records


@pytest.mark.parametrize("block", [5, 1 << 20])
@pytest.mark.parametrize(("place", "byte"), [(3, "}"), (40, "]"), (41, '"'), (77, ","), (199, ":")])
def test_damaged_array_is_reported_at_the_position_of_json(tmp_path, monkeypatch, block, place, byte):
    text = json.dumps([{"prompt": f"Is {n}?", "response": "Yes."} for n in range(9)], indent=1)
    damaged = text[:place] + byte + text[place + 1 :]
    monkeypatch.setattr(readers, "BLOCK", block)
    path = tmp_path / "a.json"
    path.write_text(damaged)
    with pytest.raises(json.JSONDecodeError) as oracle:
        json.loads(damaged)
    expected = f"line {oracle.value.lineno}, column {oracle.value.colno}: malformed JSON ({oracle.value.msg})"
    with pytest.raises(DataError) as caught:
        list(readers.read_records(path))
    assert expected in str(caught.value)


def test_trailing_commas_blank_lines_and_crlf_are_accepted(tmp_path):
    line = json.dumps({"prompt": "a", "response": "b"})
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"\ufeff{line},\r\n\r\n{line} , \r\n{line},".encode())
    assert len(list(read_conversations(path))) == 3
    path = tmp_path / "a.json"
    path.write_bytes(f"\ufeff[{line},\r\n{line},\r\n]\r\n".encode())
    assert len(list(read_conversations(path))) == 2


def test_reading_continues_after_a_bad_line(tmp_path):
    good = json.dumps({"prompt": "a", "response": "b"}).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good, b"{broken", good, b'{"prompt": "\xff"}', b'{"prompt": ""}', b"3", good]))
    items = list(read_data(path))
    assert [isinstance(item, BadRecord) for item in items] == [False, True, False, True, True, True, False]
    kinds = [item.error.kind for item in items if isinstance(item, BadRecord)]
    assert kinds == ["malformed", "malformed", "fields", "type"]
    assert "line 4: not UTF-8" in str(items[3].error)
    assert items[1].record == "{broken"


def test_array_nested_too_deeply_is_malformed(tmp_path):
    (tmp_path / "a.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"a.json, line 1.*nested too deeply"):
        list(read_conversations(tmp_path / "a.json"))


def test_line_nested_too_deeply_is_a_bad_record_and_reading_continues(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": ' + "[" * 200_000 + "\n" + json.dumps(GOOD) + "\n")
    bad, good = read_data(tmp_path / "a.jsonl")
    assert isinstance(bad, BadRecord) and "nested too deeply" in str(bad.error)
    assert not isinstance(good, BadRecord)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".jsonl.gz"])
@pytest.mark.parametrize(
    ("encoding", "mark", "named"),
    [
        ("utf-16-le", b"\xff\xfe", "UTF-16"),
        ("utf-16-be", b"\xfe\xff", "UTF-16"),
        ("utf-32-le", b"\xff\xfe\0\0", "UTF-32"),
        ("utf-32-be", b"\0\0\xfe\xff", "UTF-32"),
        ("gbk", b"", "GBK"),
    ],
)
def test_the_remedy_names_the_encoding_of_the_file(encoding, mark, named, suffix, tmp_path):
    text = "prompt,response\n你好,很好\n" if suffix == ".csv" else '{"prompt": "你好", "response": "很好"}\n'
    content = mark + (f"[{text}]" if suffix == ".json" else text).encode(encoding)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    assert f"not UTF-8; save the file as UTF-8 (`iconv -f {named} -t UTF-8` " in error_of(path)
