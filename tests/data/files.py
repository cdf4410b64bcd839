"""Helpers of the tests that read data files."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_recipe.data.formats import read_conversations
from sft_recipe.data.sources import resolve_files
from sft_recipe.errors import DataError

TRICKY = ' "quoted", it\'s\r\n你好，世界 👩‍🚀 \u2028 \\n \ufeff\ttrailing  '
TURNS = [("system", " Be kind.\n"), ("user", TRICKY), ("assistant", TRICKY + "!")]
DICTS = [{"role": role, "content": content} for role, content in TURNS]
RECORDS = {
    "preference": {"prompt": TRICKY, "chosen": TRICKY + "!", "rejected": "No.", "system": " Be kind.\n"},
    "prompt_completion": {"prompt": TRICKY, "completion": TRICKY + "!", "system": " Be kind.\n"},
    "query_response": {"query": TRICKY, "response": TRICKY + "!", "system": " Be kind.\n"},
    "prompt_response": {"prompt": TRICKY, "response": TRICKY + "!", "system": " Be kind.\n", "id": "7"},
    "alpaca": {"instruction": TRICKY, "input": "", "output": TRICKY + "!", "system": " Be kind.\n"},
    "conversations": {"conversations": DICTS, "id": "7"},
    "messages": {"messages": DICTS},
}
SUFFIXES = [".json", ".jsonl", ".parquet", ".csv"]
GOOD = {"prompt": "Hi", "response": "Hello."}


def write(path, records):
    """Write records in the file type of the suffix."""
    if path.suffix == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        path.write_text("".join(lines), encoding="utf-8", newline="")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(records[0])
            for record in records:
                rows.writerow([v if isinstance(v, str) else json.dumps(v) for v in record.values()])
    return path


def raw(path, data):
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def turns_of(path, format="auto"):
    return [[(m.role, m.content) for m in c.messages] for c in read_conversations(path, format)]


def error_of(path, format="auto"):
    with pytest.raises(DataError) as caught:
        list(read_conversations(path, format))
    return str(caught.value)


def paths_of(spec):
    return [file for source in resolve_files(spec) for file in source.files]


def files_error(spec):
    with pytest.raises(DataError) as caught:
        resolve_files(spec)
    return str(caught.value)
