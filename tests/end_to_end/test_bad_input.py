"""Configuration and data errors end in one message and exit code 2 before training, and keep existing files."""

import json

import pytest

from tests.support import tiny
from tests.support.runs import run_here

GOOD = [{"prompt": f"Say {i}.", "response": f"{i}."} for i in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("bad") / "model")


@pytest.fixture
def run(model, tmp_path, capfd):
    """Return a function that runs one step on `records` (or a file's text) and returns exit code and stderr."""

    def start(records=GOOD, *extra, name="data.json"):
        path = tmp_path / name
        if isinstance(records, str):
            path.write_text(records)
        elif records is not None:
            path.write_text(json.dumps(records))
        capfd.readouterr()
        code = run_here(
            f"model.path={model}",
            f"data.train_files={path}",
            f"data.cache_dir={tmp_path}/cache",
            f"trainer.output_dir={tmp_path}/out",
            "trainer.device=cpu",
            "trainer.total_training_steps=1",
            *extra,
        )
        return code, capfd.readouterr().err

    return start


def test_valid_input_runs(run):
    assert run()[0] == 0


@pytest.mark.parametrize(
    ("records", "expected_texts"),
    [
        (None, ["data.json", "no"]),
        ("", ["data.json", "empty"]),
        ("[]", ["data.json"]),
        ('[{"prompt": "a", "response": "b"},\n {"prompt": ]', ["data.json", "line 2", "column"]),
        ([*GOOD, {"prompt": "a"}], ["data.json", "record 7", "response"]),
        ([*GOOD, {"promt": "a", "response": "b"}], ["record 7", "prompt"]),
        ([*GOOD, {"prompt": "a", "response": 3}], ["record 7", "response", "number"]),
        ([*GOOD, {"prompt": "a", "response": "  "}], ["record 7", "empty response"]),
        ([{"messages": [{"role": "robot", "content": "a"}]}], ["record 1", "messages[0].role", "robot"]),
        (
            [{"messages": [{"role": "system", "content": "a"}] * 2 + [{"role": "assistant", "content": "b"}]}],
            ["record 1", "system"],
        ),
        ([{"messages": [{"role": "user", "content": "a"}]}], ["record 1", "assistant"]),
    ],
)
def test_invalid_data(run, records, expected_texts):
    code, error = run(records)
    assert code == 2
    assert error.startswith("error: ") and "Traceback" not in error
    for part in expected_texts:
        assert part in error


def test_directory_instead_of_a_file_is_reported(run, tmp_path):
    (tmp_path / "data.json").mkdir()
    code, error = run(None)
    assert code == 2 and "directory" in error


def test_only_too_long_examples_are_reported_with_the_key_to_set(run):
    code, error = run(GOOD, "data.max_length=4")
    assert code == 2
    assert "none of the 6 examples fits" in error and "max_length=4" in error and "MAX_LENGTH" in error


def test_truncation_error_names_the_record(run):
    code, error = run([*GOOD, {"prompt": "x " * 500, "response": "y"}], "data.max_length=100", "data.truncation=error")
    assert code == 2 and "record 7" in error and "max_length=100" in error


def test_dropped_examples_are_reported(run, capfd, model, tmp_path):
    (tmp_path / "long.json").write_text(json.dumps([*GOOD, {"prompt": "x " * 500, "response": "y"}]))
    capfd.readouterr()
    code = run_here(
        f"model.path={model}",
        f"data.train_files={tmp_path}/long.json",
        f"data.cache_dir={tmp_path}/cache",
        f"trainer.output_dir={tmp_path}/out",
        "trainer.device=cpu",
        "trainer.total_training_steps=1",
        "data.max_length=100",
    )
    output = capfd.readouterr().out
    assert code == 0 and "1 of 7 examples (14.3%)" in output and "left out" in output


@pytest.mark.parametrize(
    ("extra", "expected_texts"),
    [
        (["model.path=./no/such/model"], ["no/such/model"]),
        (["model.path=org/unreachable"], ["org/unreachable", "hub"]),
        (["data.train_batch_size=0"], ["data.train_batch_size"]),
        (["optim.learning_rate=1"], ["optim.learning_rate", "optim.lr"]),
        (["data.val_files=missing.json"], ["missing.json"]),
        (["trainer.device=cuda"], ["GPU"]),
        (["trainer.n_gpus_per_node=2"], ["torchrun"]),
        (["fsdp=megatron"], ["megatron", "not installed", "GPU"]),
        (["trainer.logger=[console,mlflow]"], ["mlflow", "pip install"]),
        (["trainer.logger=[wandbb]"], ["wandbb"]),
        (["fsdp.ulysses_sequence_parallel_size=2"], ["1 rank cannot be grouped", "parallel sizes"]),
        (["model.tokenizer_path={tokenizer}"], ["tokenizer", "512 embeddings"]),
        (["trainer.resume_from={nothing}"], ["nothing"]),
        (["trainer.output_dir={file}/out"], ["cannot be written"]),
        (["optim.optimizer=AdamWW"], ["AdamWW"]),
        (["lora.enabled=true", "lora.target_modules=[q_proj,v_porj]"], ["v_porj", "Did you mean v_proj?"]),
        (["lora.enabled=true", "lora.exclude_modules=[q_porj]"], ["q_porj", "Did you mean q_proj?"]),
        (["model.attn_implementation=flash_attention_9"], ["flash_attention_9"]),
    ],
)
def test_invalid_settings(run, tmp_path, extra, expected_texts):
    (tmp_path / "file").touch()
    big = tiny.build_tokenizer(vocab_size=512)
    big.add_tokens([f"token{i}" for i in range(64)])
    big.save_pretrained(tmp_path / "tokenizer")
    places = {name: tmp_path / name for name in ("tokenizer", "nothing", "file")}
    code, error = run(GOOD, *(text.format(**places) if "{" in text else text for text in extra))
    assert code == 2, error
    assert "Traceback" not in error
    for part in expected_texts:
        assert part in error


def test_error_before_training_keeps_existing_files(run, tmp_path):
    def files():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name != ".lock"}

    assert run()[0] == 0
    before = {path: time for path, time in files().items() if path.is_file()}
    assert run(GOOD, "data.max_length=4")[0] == 2
    assert run()[0] == 2
    assert {path: time for path, time in files().items() if path.is_file()} == before


def test_ranks_report_an_error_once(warm, model, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(GOOD))
    arguments = [f"model.path={model}", f"data.train_files={tmp_path}/data.json", f"trainer.output_dir={tmp_path}/out"]
    end = warm.run([*arguments, "trainer.device=cpu", "data.train_batch_size=1"], ranks=2)
    assert end.codes == [2, 2]
    assert end.output.count("error: BATCH_SIZE=1 is smaller than the number of ranks (2)") == 1


def test_invalid_records_are_skipped_up_to_a_ratio(run, tmp_path, capfd):
    records = [*GOOD * 5, {"prompt": "a", "response": ""}]
    code, error = run(records)
    assert code == 2 and "record 31" in error and "data.on_bad_record=skip" in error
    code, error = run(records, "data.on_bad_record=skip")
    assert code == 0, error
    (row,) = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    assert json.loads(row)["record"] == records[-1] and "record 31" in json.loads(row)["reason"]
    code, error = run(records, "data.on_bad_record=skip", "data.max_bad_ratio=0.01", f"trainer.output_dir={tmp_path}/b")
    assert code == 2 and "1 of 31 records" in error and "max_bad_ratio=0.01" in error
    assert (tmp_path / "b/rejected.jsonl").is_file()


@pytest.mark.parametrize(
    ("extra", "expected_texts"),
    [
        (["data.columns={respons: answer}"], ["respons", "response"]),
        (["data.columns={response: answer}"], ["'answer'", "no record has"]),
        (["data.enable_thinking=true"], ["enable_thinking", "no such switch"]),
        (["model.chat_template={nothing}/t.jinja"], ["model.chat_template", "cannot be read"]),
        (["data.train_on=first"], ["data.train_on", "all, last"]),
        (["data.train_files={file}*0"], ["asks for no examples"]),
    ],
)
def test_invalid_data_settings(run, tmp_path, extra, expected_texts):
    (tmp_path / "file").touch()
    places = {"nothing": tmp_path / "nothing", "file": tmp_path / "file"}
    code, error = run(
        GOOD,
        *(text.replace("{nothing}", str(places["nothing"])).replace("{file}", str(places["file"])) for text in extra),
    )
    assert code == 2, error
    assert "Traceback" not in error
    for part in expected_texts:
        assert part in error
