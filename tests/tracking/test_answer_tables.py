"""Every logger gets the names of metrics.jsonl, and the generated answers as a table where it has tables."""

import json
import sqlite3
import struct
import sys
from types import ModuleType, SimpleNamespace

import pytest
from lxml import html

from sft_recipe.engine.cpu.platform import use_cpu
from sft_recipe.errors import PreflightError
from sft_recipe.evaluation.generation import Sample
from sft_recipe.tracking.answer_tables import COLUMNS, NAME, log_answers
from sft_recipe.tracking.loggers import check_loggers
from tests.support import tiny
from tests.support.runs import all_rows, run_here
from tests.support.small_run import arguments

SAMPLES = [
    Sample("chat", "a | *b*\n\n<c>", "one & `two`", "你好<|end|>", False),
    Sample("prompts", "Name three fruits.", None, "", True),
]
ROWS = [
    [7, "chat", "a | *b*\n\n<c>", "one & `two`", "你好<|end|>", False],
    [7, "prompts", "Name three fruits.", "", "", True],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("tables") / "model")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """A current folder in which nothing may appear."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def logged(model, folder, *loggers):
    return arguments(
        model, folder, f"trainer.logger=[{','.join(loggers)}]", "trainer.total_training_steps=2", "trainer.test_freq=1",
        "eval.generate=2", "eval.prompts=[Name three fruits.]", "eval.max_new_tokens=4",
    )  # fmt: skip


def expected_numbers(folder):
    """Step -> the numbers that loggers get, from metrics.jsonl."""
    rows = [dict(row) for row in all_rows(folder / "out")]
    for row in rows:
        row["train/epoch"] = row.pop("epoch")
        del row["format_version"]
    return {row.pop("step"): {key: value for key, value in row.items() if value is not None} for row in rows}


def expected_answers(folder):
    """Step -> the rows of the table, from samples.jsonl."""
    rows = map(json.loads, (folder / "out/samples.jsonl").read_text().splitlines())
    fields = ("set", "prompt", "reference", "answer", "is_truncated")
    return {
        row["step"]: [
            [row["step"], *(one[field] if one[field] is not None else "" for field in fields)] for one in row["samples"]
        ]
        for row in rows
    }


def test_tensorboard_and_wandb_get_numbers_and_tables(warm, model, tmp_path):
    end = warm.run(logged(model, tmp_path, "tensorboard", "wandb"), WANDB_MODE="offline")
    assert end.code == 0, end.output
    numbers, answers = expected_numbers(tmp_path), expected_answers(tmp_path)
    assert list(numbers) == list(answers) == [0, 1, 2] and len(answers[0]) == 3
    assert {key.partition("/")[0] for row in numbers.values() for key in row} == {"train", "val", "eval", "perf"}
    assert tensorboard_of(tmp_path / "out/tensorboard") == (
        {step: pytest.approx(row, rel=1e-6) for step, row in numbers.items()},
        {step: [COLUMNS, *([str(value) for value in row] for row in rows)] for step, rows in answers.items()},
    )
    assert wandb_of(tmp_path / "out/wandb") == (numbers, answers)


def tensorboard_of(folder):
    """Step -> numbers, and step -> cells of the table as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    events = EventAccumulator(str(folder)).Reload()
    numbers, tables = {}, {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            numbers.setdefault(event.step, {})[name] = event.value
    for event in events.Tensors(f"{NAME}/text_summary"):
        (text,) = event.tensor_proto.string_val
        tables[event.step] = cells(markdown_to_safe_html(text))
    return numbers, tables


def cells(table):
    tree = html.fromstring(table)
    for line_break in tree.iter("br"):
        line_break.tail = "\n" + (line_break.tail or "")
    return [[cell.text_content() for cell in row] for row in tree.iter("tr")]


def wandb_of(folder):
    """The same from the file of the offline run, without what wandb adds."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("offline-run-*/run-*.wandb")
    numbers, tables = {}, {}
    for record in map(Record.FromString, chunks(path.read_bytes())):
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if row:
            content = json.loads((path.parent / "files" / row[f"{NAME}/path"]).read_text())
            assert content["columns"] == COLUMNS
            tables[row["_step"]] = content["data"]
            numbers[row["_step"]] = {key: value for key, value in row.items() if not key.startswith(("_", f"{NAME}/"))}
    return numbers, tables


def chunks(data):
    """The records of a log in LevelDB's format after wandb's 7 bytes: parts in blocks of 32 KiB."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:  # too short for checksum, length and kind of a part
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record, place = record + data[place + 7 : place + 7 + length], place + 7 + length
        if kind in (1, 4):  # all, or the last part
            yield record
            record = b""


def test_tensorboard_shows_texts_as_they_are(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    adapter = SimpleNamespace(writer=SummaryWriter(tmp_path))
    log_answers({"tensorboard": adapter}, 7, SAMPLES)
    adapter.writer.close()
    assert tensorboard_of(tmp_path)[1] == {7: [COLUMNS, *([str(value) for value in row] for row in ROWS)]}


class Calls(list):
    """A module of a logger whose functions have the signatures of its documentation, and remember their calls."""

    def log(self, data, step=None):
        self.append((data, step))

    def log_table(self, data, artifact_file, run_id=None):
        self.append((data, artifact_file))

    class Table(SimpleNamespace):
        def __init__(self, columns=None, data=None):
            super().__init__(columns=columns, data=data)

        def add(self, headers, rows):
            self.columns, self.data = headers, rows
            return self


def test_tables_are_logged_as_documented(monkeypatch):
    """For packages that need not be installed; wandb's documentation is that of the module of vemlp_wandb as well."""
    calls = {name: Calls() for name in ("mlflow", "swanlab", "trackio", "vemlp_wandb")}
    calls["swanlab"].echarts = SimpleNamespace(Table=Calls.Table)
    monkeypatch.setitem(sys.modules, "mlflow", calls["mlflow"])
    adapter = SimpleNamespace(trackio=calls["trackio"], log=calls["trackio"].log)
    log_answers({"file": None, "clearml": None, **calls, "trackio": adapter}, 7, SAMPLES)
    for name in ("swanlab", "trackio", "vemlp_wandb"):
        [(logged, step)] = calls[name]
        assert step == 7 and (logged[NAME].columns, logged[NAME].data) == (COLUMNS, ROWS)
    [(columns, file)] = calls["mlflow"]
    assert file == "eval/answers.json" and columns == {
        name: [row[number] for row in ROWS] for number, name in enumerate(COLUMNS)
    }


def mlflow_of(out):
    with sqlite3.connect(out / "mlflow.db") as base:
        found = base.execute("select step, key, value from metrics").fetchall()
    (table,) = (out / "mlartifacts").rglob("eval/answers.json")
    content = json.loads(table.read_text())
    assert content["columns"] == COLUMNS
    return found, content["data"]


def swanlab_of(out):
    tables = [json.loads(path.read_text()) for path in sorted(out.glob("swanlog/run-*/media/echarts/*.json"))]
    return None, [[row[name] for name in COLUMNS] for table in tables for row in table["rowData"]]


def trackio_of(out):
    with sqlite3.connect(out.parent / "trackio/sft_recipe.db") as base:
        logged = [
            (step, json.loads(row)) for step, row in base.execute("select step, metrics from metrics order by id")
        ]
    tables = [row.pop(NAME)["_value"] for _, row in logged if NAME in row]
    found = [(step, key, value) for step, row in logged for key, value in row.items()]
    return found, [[row[name] for name in COLUMNS] for table in tables for row in table]


PACKAGES = {"mlflow": mlflow_of, "swanlab": swanlab_of, "trackio": trackio_of}


@pytest.mark.parametrize("name", PACKAGES)
def test_package_itself_gets_numbers_and_tables(model, tmp_path, monkeypatch, home, name):
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(name)
    use_cpu()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert run_here(*logged(model, tmp_path, name)) == 0
    numbers, answers = PACKAGES[name](tmp_path / "out")
    assert answers == [row for rows in expected_answers(tmp_path).values() for row in rows]
    wanted = expected_numbers(tmp_path)
    assert numbers is None or {(step, key): value for step, key, value in numbers} == pytest.approx(
        {(step, key): value for step, row in wanted.items() for key, value in row.items()}
    )
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(("name", "module"), [("vemlp_wandb", "volcengine_ml_platform"), ("rl_insight", "rl_insight")])
def test_package_with_another_name_is_looked_for(monkeypatch, name, module):
    config = SimpleNamespace(trainer=SimpleNamespace(logger=[name], wandb_project=None))
    with pytest.raises(PreflightError, match=f"pip install {module.replace('_', '-')}"):
        check_loggers(config)
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    check_loggers(config)


def test_logger_that_verl_gives_up_is_one_message(model, tmp_path, monkeypatch, capfd):
    """verl trains on without mlflow; `set_experiment` fails as it does without a server."""
    from verl.utils import tracking

    use_cpu()
    monkeypatch.setattr(tracking, "MLFLOW_SLEEP_SECONDS", 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    stub = ModuleType("mlflow")
    stub.set_tracking_uri = lambda uri: None
    monkeypatch.setitem(sys.modules, "mlflow", stub)
    assert run_here(*logged(model, tmp_path, "mlflow")) == 2
    assert "trainer.logger: mlflow cannot be started" in capfd.readouterr().err
