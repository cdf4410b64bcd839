"""scripts/prepare_sft_data.py: what can be used comes out once, on one side of the split; the rest is counted."""

import json

import pyarrow.parquet as pq
import pytest

from sft_recipe.cli import prepare as prepare_data
from sft_recipe.data import parquet_writer
from sft_recipe.data.formats import read_conversations

CALL = {"type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": None}}}
SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"default": None, "type": "object"}}}


def write(path, records):
    path.write_text(json.dumps(records))
    return str(path)


def pairs(count):
    return [{"prompt": f"Say {n}.", "response": f"{n}."} for n in range(count)]


def conversations(folder, *names):
    return [c for name in names for c in read_conversations(folder / f"{name}.parquet")]


def test_pairs_are_split_without_duplicates(tmp_path, capsys):
    records = pairs(40)
    source = write(tmp_path / "a.json", [*records, *records[:10], {"prompt": "x", "response": " "}])
    assert prepare_data.main(["--in", source, "--out", str(tmp_path / "out"), "--val_ratio", "0.25"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "51 records read" in output and "1 dropped: empty" in output and "10 dropped: exact duplicates" in output
    assert pq.read_schema(tmp_path / "out/train.parquet").names == ["prompt", "response"]
    train, validation = conversations(tmp_path / "out", "train"), conversations(tmp_path / "out", "validation")
    assert (len(train), len(validation)) == (30, 10)
    texts = [c.messages[0].content for c in [*train, *validation]]
    assert sorted(texts) == sorted(record["prompt"] for record in records)
    assert texts[:30] == sorted(texts[:30], key=lambda text: int(text[4:-1]))  # in the order of the data
    (rejected,) = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["kind"] == "empty"


def test_split_is_seeded_and_small_is_a_subset_of_train(tmp_path):
    source = write(tmp_path / "a.json", pairs(50))
    parts_of = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert prepare_data.main(["--in", source, "--out", str(tmp_path / name), "--seed", seed, "--small", "7"]) == 0
        parts_of[name] = [conversations(tmp_path / name, part) for part in ("train", "validation", "train_small")]
    assert parts_of["a"] == parts_of["b"] != parts_of["c"]
    train, validation, small = parts_of["a"]
    assert (len(train), len(validation), len(small)) == (48, 2, 7)
    assert all(conversation in train for conversation in small)


def test_template_variables_are_written_and_lost_keys_are_named(tmp_path, capsys):
    records = [
        record | {"chat_template_kwargs": {"style": n % 2 or None}, "id": n} for n, record in enumerate(pairs(4))
    ]
    source = write(tmp_path / "a.json", records)
    assert prepare_data.main(["--in", source, "--out", str(tmp_path / "out"), "--val_ratio", "0"]) == 0
    found = [c.chat_template_kwargs for c in conversations(tmp_path / "out", "train")]
    assert found == [{}, {"style": 1}, {}, {"style": 1}]
    assert "keys that are not read: id (4 records)" in capsys.readouterr().out


def test_other_names_of_roles(tmp_path):
    turns = [{"role": "Client", "content": "a"}, {"role": "Agent", "content": "b"}]
    source = write(tmp_path / "a.json", [{"messages": turns}])
    arguments = ["--in", source, "--out", str(tmp_path / "out"), "--val_ratio", "0"]
    assert prepare_data.main([*arguments, "--roles", "Client=user", "Agent=assistant"]) == 0
    assert pq.read_table(tmp_path / "out/train.parquet").to_pylist() == [{"prompt": "a", "response": "b"}]


def test_every_part_of_a_conversation_is_preserved(tmp_path):
    """Files of several formats; a key that a record lacks is no null; nothing in calls and schemas changes."""
    records = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}] * 2},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "1", "name": "f", "tool_call_id": "c"},
                {"role": "assistant", "content": "b", "reasoning_content": "hm"},
            ],
            "tools": [SCHEMA],
        },
    ]
    sources = [write(tmp_path / "a.json", records), write(tmp_path / "b.json", pairs(1))]
    assert prepare_data.main(["--in", *sources, "--out", str(tmp_path / "out"), "--val_ratio", "0"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.parquet"]
    expected = [c for source in sources for c in read_conversations(source)]
    actual = conversations(tmp_path / "out", "train")
    assert actual == expected
    assert json.dumps(actual[1].as_record()) == json.dumps(expected[1].as_record())


@pytest.mark.parametrize(
    ("extra", "expected_text"),
    [
        (["--val_ratio", "1.5"], "--val_ratio is 1.5"),
        (["--val-ratio", "0.5"], "unknown flag --val-ratio. Did you mean --val_ratio?"),
        (["--zzz"], "unknown flag --zzz. See scripts/prepare_sft_data.py --help."),
        (["--seed", "1", "stray"], "cannot read 'stray': it is no flag"),
        (["--small", "0"], "--small is 0"),
        (["--columns", "answer"], "expected NAME=COLUMN"),
        (["--columns", "respons=answer"], "Did you mean response?"),
        (["--columns", "system=sys"], "system='sys', but no record has such a column"),
        (["--roles", "Agent"], "expected NAME=ROLE, as in Agent=assistant"),
        (["--roles", "Agent=robot"], "'robot' is not a role; expected system, user, assistant, tool"),
        (["--format", "alpaca"], "record 1: the fields (prompt, response) fit no format"),
    ],
)
def test_invalid_option_is_one_message(tmp_path, capsys, extra, expected_text):
    source = write(tmp_path / "a.json", pairs(4))
    assert prepare_data.main(["--in", source, "--out", str(tmp_path / "out"), *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected_text in error
    assert not list(tmp_path.glob("out/*"))


def test_invalid_record_stops_or_is_skipped(tmp_path, capsys):
    source = write(tmp_path / "a.json", [*pairs(3), {"prompt": "x", "response": 3}])
    assert prepare_data.main(["--in", source, "--out", str(tmp_path / "out")]) == 2
    assert "record 4: response is a number" in capsys.readouterr().err
    assert prepare_data.main(["--in", source, "--out", str(tmp_path / "out"), "--on_bad_record", "skip"]) == 0
    assert "1 dropped: cannot be used" in " ".join(capsys.readouterr().out.split())
    assert len(conversations(tmp_path / "out", "train", "validation")) == 3


def test_weighted_source_and_single_example_are_rejected(tmp_path, capsys):
    source = write(tmp_path / "a.json", pairs(1))
    assert prepare_data.main(["--in", f"{source}*0.5", "--out", str(tmp_path / "out")]) == 2
    assert "has a weight or count" in capsys.readouterr().err
    assert prepare_data.main(["--in", source, "--out", str(tmp_path / "out")]) == 2
    assert "one example cannot be split" in capsys.readouterr().err


def test_failure_keeps_existing_files(tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "a.json", pairs(9))
    assert prepare_data.main(["--in", source, "--out", str(tmp_path / "out")]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet_writer, "_row", full)
    assert prepare_data.main(["--in", write(tmp_path / "b.json", pairs(5)), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [(["--seed", "-1"], "--seed is -1; it must be 0 or more"), (["--out", ""], "--out needs a value")],
)
def test_bad_option_is_one_message_and_nothing_is_written(tmp_path, monkeypatch, capsys, options, expected):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "a.json", pairs(4))
    assert prepare_data.main(["--in", source, "--out", "out", *options]) == 2
    assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_repeated_flags_add_up_or_print_a_notice(tmp_path, capsys):
    first, second = write(tmp_path / "a.json", pairs(4)), write(tmp_path / "b.json", pairs(9)[4:])
    words = ["--in", first, "--in", second, "--out", str(tmp_path / "x"), "--out", str(tmp_path / "out")]
    assert prepare_data.main([*words, "--val_ratio", "0"]) == 0
    assert len(conversations(tmp_path / "out", "train")) == 9 and not (tmp_path / "x").exists()
    output, errors = capsys.readouterr()
    assert "9 records read" in " ".join(output.split())
    assert errors == f"notice: --out {tmp_path}/out replaces --out {tmp_path}/x: the last one is used\n"


def test_without_arguments_it_prepares_the_example_data_and_prints_the_command_that_trains(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert prepare_data.main([]) == 0
    train, validation = (
        conversations(tmp_path / "prepared", "train"),
        conversations(tmp_path / "prepared", "validation"),
    )
    total = len(list(read_conversations(prepare_data.EXAMPLE)))
    assert (len(train), len(validation)) == (total - round(0.05 * total), round(0.05 * total))
    command = "train on it: ./train.sh --train_data prepared/train.parquet --val_data prepared/validation.parquet"
    assert capsys.readouterr().out.splitlines()[-1] == command


def test_the_command_that_trains_names_what_was_written(tmp_path, capsys):
    source, out = write(tmp_path / "a.json", pairs(4)), tmp_path / "two words"
    assert prepare_data.main(["--in", source, "--out", str(out), "--val_ratio", "0", "--small", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"train on it: ./train.sh --train_data '{out}/train.parquet'"


def test_a_file_that_is_read_is_not_replaced(tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare_data.main(["--in", write(tmp_path / "a.json", pairs(20)), "--out", str(out)]) == 0
    before = (out / "train.parquet").read_bytes()
    (tmp_path / "link.parquet").symlink_to(out / "train.parquet")
    capsys.readouterr()
    for given in (out / "train.parquet", tmp_path / "link.parquet"):
        assert prepare_data.main(["--in", str(given), "--out", str(out)]) == 2
        assert "would be replaced by a part of itself; name another folder" in capsys.readouterr().err
    assert (out / "train.parquet").read_bytes() == before and len(list(out.iterdir())) == 2
