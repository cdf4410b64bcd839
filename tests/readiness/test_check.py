"""check_sft_ready.py: what it reports of good and bad runs, as text and JSON, in English and Chinese."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from sft_recipe.cli import check
from sft_recipe.config.compose import load_config
from sft_recipe.launch.local import HEAP_SETTINGS
from sft_recipe.readiness import machine, plan
from sft_recipe.readiness.chinese import CHINESE, NAMES
from sft_recipe.training.schedule import Schedule
from tests.support import seq2seq, tiny

RECORDS = [{"prompt": f"What is {i} and {i}?", "response": f"It is {2 * i}."} for i in range(40)]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model, data, and a cache that the tests share."""
    folder = tmp_path_factory.mktemp("check")
    tiny.build_model(folder / "model")
    (folder / "train.json").write_text(json.dumps(RECORDS[:30]))
    (folder / "val.json").write_text(json.dumps(RECORDS[30:]))
    return folder


@pytest.fixture
def ask(work, capsys, monkeypatch):
    """Return a function: the exit code and the parsed JSON of check_sft_ready.py with other arguments."""
    monkeypatch.setattr(machine, "SLOW_DISK", 0)

    def run(*words):
        names = {word.partition("=")[0] for word in words}
        usual = [word for word in arguments(work) if word.partition("=")[0] not in names]
        code = check.main(["--json", *usual, *words])
        return code, json.loads(capsys.readouterr().out)

    return run


def arguments(work):
    return [
        f"--model={work}/model", f"--train_data={work}/train.json", f"--val_data={work}/val.json",
        f"data.cache_dir={work}/cache", f"--output_dir={work}/out", "trainer.device=cpu",
    ]  # fmt: skip


def found(report, name):
    return next(item for item in report["checks"] if item["name"] == name)


def test_a_good_run_is_ready(ask):
    code, report = ask()
    assert code == 0 and report["ok"] is True
    assert {item["status"] for item in report["checks"]} == {"ok"}
    names = [item["name"] for item in report["checks"]]
    assert {"device", "output folder", "data", "weights", "chat template", "validation", "steps", "memory", "disk"} <= {
        *names
    }
    assert set(report["checks"][0]) == {"name", "status", "message", "remedy"}
    assert found(report, "data")["message"] == "30 records in 1 file (.json)"
    assert "24 steps (8 an epoch) of 4 examples" in found(report, "steps")["message"]
    lengths = [len(record["prompt"]) + len(record["response"]) for record in RECORDS[:30]]
    assert found(report, "length of texts")["message"].startswith(f"{min(lengths)} to {max(lengths)} characters")


def test_gpus_of_amd_and_of_macs_are_named_as_such(monkeypatch):
    config = load_config([])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    check = machine._device(config)
    assert check.message("en").startswith("this Mac's GPU (MPS) is not supported: 1 rank on its CPU")
    properties = SimpleNamespace(name="AMD Instinct MI300X", total_memory=192 * 2**30, gcnArchName="gfx942:sramecc+")
    monkeypatch.setattr(machine.preflight, "choose_device", lambda _: "cuda")
    monkeypatch.setattr(machine.preflight, "check", lambda *_: None)
    monkeypatch.setattr(torch.version, "hip", "7.1.52802")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    check = machine._device(config)
    assert check.message("en") == "8 x AMD Instinct MI300X, 192.0 GiB, gfx942; ROCm 7.1.52802"
    assert check.message("zh") == "8 块 AMD Instinct MI300X，显存 192.0 GiB，gfx942；ROCm 7.1.52802"


def test_nothing_is_written_but_the_cache(ask, work):
    before = {path for path in work.rglob("*") if "cache" not in path.parts}
    ask()
    assert {path for path in work.rglob("*") if "cache" not in path.parts} == before


def test_replaced_model_is_reported_once(ask, work, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, report = ask("--model=owner/absent", f"model.fallback={work}/model")
    notices = [item["name"] for item in report["checks"] if "owner/absent" in item["message"]]
    assert notices == ["model"]


@pytest.mark.parametrize(
    ("words", "name", "status", "text"),
    [
        (["--train_data={work}/none.json"], "data", "error", "none.json"),
        (["--train_data={bad}"], "bad records", "error", "1 of 3 records cannot be used; the first: "),
        (
            ["--train_data={bad}", "data.on_bad_record=skip", "data.max_bad_ratio=0.5"],
            "bad records",
            "warning",
            "1 of 3",
        ),
        (["--train_data={bad}"], "empty values", "ok", "note (2)"),
        (["--model={work}/absent"], "model", "error", "absent"),
        (["--model={cut}"], "model", "error", "bytes instead of"),
        (["--val_data={work}/train.json"], "validation", "warning", "30 of 30 examples are also trained on"),
        (["--val_data=none"], "validation", "warning", "no validation data"),
        (["--train_data={twice}"], "duplicates", "warning", "30 exact duplicates"),
        (["trainer.total_training_steps=3"], "steps", "warning", "3 steps"),
        (["--max_length=8"], "data", "error", "8"),
        (["--n_gpus=8", "--batch_size=4"], "device", "error", "BATCH_SIZE"),
        (["--n_gpus=2", "trainer.nnodes=2", "--master_addr=h"], "network", "ok", "SOCKET_IFNAME"),
    ],
)
def test_what_is_wrong_is_found(ask, work, tmp_path, words, name, status, text):
    bad, twice, cut = tmp_path / "bad.jsonl", tmp_path / "twice.json", tmp_path / "cut"
    bad.write_text(
        '{"prompt": "a", "response": "b", "note": null}\n{"prompt": "c", "response": "d", "note": ""}\n{"prompt": 7}\n'
    )
    twice.write_text(json.dumps(RECORDS[:30] * 2))
    shutil.copytree(work / "model", cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, report = ask(*(word.format(work=work, bad=bad, twice=twice, cut=cut) for word in words))
    matching = [item for item in report["checks"] if item["name"] == name and item["status"] == status]
    assert any(text in item["message"] for item in matching), report["checks"]
    if name == "bad records":
        assert f"the first: {bad}, line 3: the fields (prompt) fit no format" in matching[0]["message"]
    assert code == (2 if any(item["status"] == "error" for item in report["checks"]) else 0)
    assert report["ok"] is (code == 0)


@pytest.mark.parametrize(
    ("words", "remedy", "chinese"),
    [
        ([], "correct them (scripts/preview_data.py --html FILE lists reasons), or data.on_bad_record=skip with a "
         "data.max_bad_ratio above 0.05", "且 data.max_bad_ratio 大于 0.05"),
        (["data.on_bad_record=skip"], "correct them (scripts/preview_data.py --html FILE lists reasons), or "
         "data.on_bad_record=skip with a data.max_bad_ratio above 0.05", "且 data.max_bad_ratio 大于 0.05"),
        (["data.max_bad_ratio=0.5"], "correct them (scripts/preview_data.py --html FILE lists reasons), or "
         "data.on_bad_record=skip", "修正它们（scripts/preview_data.py --html 文件 会列出原因）"),
        (["data.on_bad_record=skip", "data.max_bad_ratio=0.5"], "scripts/preview_data.py --html FILE lists reasons",
         "会列出原因"),
    ],
)  # fmt: skip
def test_the_remedy_for_bad_records_names_the_limit_that_they_exceed(ask, tmp_path, words, remedy, chinese):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n{}\n')
    words = [f"--train_data={tmp_path}/bad.jsonl", *words]
    assert found(ask(*words)[1], "bad records")["remedy"] == remedy
    assert chinese in found(ask(*words, "--lang=zh")[1], "bad records")["remedy"]


def test_roles_and_token_ids_are_read_as_the_run_reads_them(ask, tmp_path):
    named, pairs = tmp_path / "named.jsonl", tmp_path / "pairs.jsonl"
    turns = [{"role": "Client", "content": "Hi"}, {"role": "Agent", "content": "Hello."}]
    named.write_text(json.dumps({"messages": turns}) + "\n")
    code, report = ask(f"--train_data={named}", "data.roles={Client: user, Agent: assistant}")
    assert code == 0, report["checks"]
    pairs.write_text(json.dumps({"input_ids": [5, 6, 3], "labels": [7, 8, 9, 10, 3]}) + "\n")  # source and target
    model = seq2seq.build_model(tmp_path / "t5")
    code, report = ask(f"--model={model}", f"--train_data={pairs}", "--batch_size=1")
    assert code == 0 and "1 record in" in found(report, "data")["message"], report["checks"]
    assert "longest 8 of MAX_LENGTH 2,048 + MAX_TARGET_LENGTH 2,048" in found(report, "length of examples")["message"]
    assert found(report, "chat template")["message"].startswith("not needed; targets end with")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "x"], "number of GPUs"),
        (["--gpus", "8"], "--gpu_memory"),
        (["--gpu_memory", "24"], "such as 24GB"),
        (["--gpu_memory", "0GB"], "such as 24GB"),
        (["--gpu_memory", "-1GB"], "--gpu_memory"),
        (["--gpu_memory", "24GB", "--measure"], "choose one"),
        (["--lang", "fr"], "--lang 'fr'"),
        (["--jsn"], "Did you mean --json"),
        (["word"], "cannot read 'word'"),
        (["optim.lr=fast"], "optim.lr"),
        (["--epochs", "0"], "total_epochs"),
    ],
)
def test_bad_command_lines_are_one_message(work, capsys, words, message):
    assert check.main([*arguments(work), *words]) == 2
    lines = capsys.readouterr().err.strip()
    assert lines.count("error:") == 1 and message in lines


@pytest.mark.parametrize("words", [["optim.lr=fast"], ["--epochs", "0"], ["--gpus", "8"], ["--lang", "fr"], ["word"]])
def test_an_error_before_the_checks_is_json_too(work, capsys, words):
    usual = [word for word in arguments(work) if not word.startswith("--lang")]
    assert check.main([*usual, *words]) == 2
    message = capsys.readouterr().err.removeprefix("error: ").strip()
    assert message and check.main(["--json", *usual, *words]) == 2
    output = capsys.readouterr()
    [found] = (report := json.loads(output.out))["checks"]
    assert report == {"ok": False, "settings": {}, "checks": [found]} and not output.err
    assert found == {"name": "configuration", "status": "error", "message": message, "remedy": ""}


def test_another_machine_is_asked_about_without_its_gpus(ask):
    code, report = ask("--gpus", "8", "--gpu_memory", "24GB", "trainer.device=auto", "--batch_size", "8")
    assert code == 0 and not [item for item in report["checks"] if item["name"] in ("device", "output folder")]
    assert "of 22.4 GiB" in found(report, "memory")["message"] and "in bf16" in found(report, "memory")["message"]


def test_what_would_fit_is_named_where_a_run_does_not(ask):
    words = ["--gpus", "1", "--gpu_memory", "800KB", "trainer.device=auto"]
    code, report = ask(*words)
    memory = found(report, "memory")
    assert code == 2 and memory["status"] == "error" and memory["remedy"].startswith("what would fit: ")
    for option in memory["remedy"].removeprefix("what would fit: ").split("; or "):
        here = option.replace("--n_gpus", "--gpus").split()
        assert found(ask(*words, *here)[1], "memory")["status"] == "ok", option


def test_texts_are_chinese_on_request(ask, work, capsys, monkeypatch):
    assert "没有验证数据" in found(ask("--lang", "zh", "--val_data=none")[1], "validation")["message"]
    monkeypatch.setenv("SFT_LANG", "zh")
    assert check.main([*arguments(work)]) == 0
    settings, lines = capsys.readouterr().out.split("\n\n", 1)
    assert "可以开始训练" in lines and "每个进程约需" in lines and "权重 " in lines and "梯度检查点 关闭" in lines
    assert [line for line in lines.splitlines() if line.isascii()] == []


def test_every_name_of_a_check_is_translated():
    code = "".join(path.read_text() for path in Path(plan.__file__).parent.glob("*.py"))
    used = set(re.findall(r'\b(?:passed|warned|failed)\(\s*"([^"]+)"', code))
    assert used == set(NAMES) and not [text for text in NAMES.values() if text.isascii()]


def test_every_text_has_a_translation_with_the_same_fields():
    fields = re.compile(r"\{(\w+)")
    assert all(set(fields.findall(english)) == set(fields.findall(chinese)) for english, chinese in CHINESE.items())


def test_a_small_shm_a_full_disk_and_few_files_are_found(monkeypatch, tmp_path):
    small = SimpleNamespace(total=64 * 2**20, free=1000, used=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    config = load_config(["trainer.n_gpus_per_node=2", f"trainer.output_dir={tmp_path}/out"])
    assert machine._shared_memory(config).status == "error"
    stats = SimpleNamespace(total=10**6, trainable=10**6)
    [disk] = plan.disk_checks(config, stats, Schedule(steps_per_epoch=8, total_steps=24), plan.Done())
    assert disk.status == "error" and "up to 3 checkpoints more at a time, of 16.00 MB" in disk.message("en")
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (256, 256))
    assert machine._open_files().status == "warning"


def test_a_slow_disk_is_said_to_be_slow(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "SLOW_DISK", 10**15)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 10**9))
    check = machine._disk_speed(load_config([f"trainer.output_dir={tmp_path}"]))
    assert check.status == "warning" and check.message("en").startswith(f"{tmp_path}: 5.00 GB free, ")
    assert check.message("en").endswith(" MB/s written, which is slow: below 1000000000 MB/s")
    assert check.message("zh").endswith(" MB/s，低于 1000000000 MB/s，较慢")


RUN = """#!{python}
import json, os, sys, time
config = json.load(sys.stdin)
with open({seen!r}, "a") as seen:
    seen.write(json.dumps([sys.argv[1:], config["trainer"], os.environ.get("GLIBC_TUNABLES")]) + "\\n")
os.makedirs(config["trainer"]["output_dir"])
with open(config["trainer"]["output_dir"] + "/metrics.jsonl", "w") as metrics:
    for step, seconds in enumerate([0, 9, 9, *[2] * 40]):  # of 100 tokens each, after an evaluation
        row = {{"step": step, "perf/seconds": seconds, "train/tokens": 100, "perf/memory_gb": 1 + step % 2}}
        metrics.write(json.dumps(row) + "\\n" + '{{"step": ')
        metrics.flush()
        metrics.seek(metrics.tell() - len('{{"step": '))
        if {error!r} and step == 5:
            sys.exit({error!r})
        time.sleep(0.02)
    time.sleep(600)
"""


def measured_by(monkeypatch, tmp_path, error, device):
    """Return the check of a run that is another program, and how it was started: arguments, trainer, heap."""
    seen, program = tmp_path / "seen", tmp_path / "python"
    program.write_text(RUN.format(python=sys.executable, seen=str(seen), error=error))
    program.chmod(0o755)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(plan.sys, "executable", str(program))
    config = load_config(["data.train_batch_size=10"])
    [check] = plan.measured(config, examples=1000, tokens=10**6, device=device, done=plan.Done(150))
    return check, json.loads(seen.read_text())


def test_measured_steps_predict_time_by_tokens_without_saving(monkeypatch, tmp_path):
    check, (command, trainer, heap) = measured_by(monkeypatch, tmp_path, "", "cpu")
    # Half of 3 epochs of a million tokens at 50 a second.
    assert check.message("en").startswith("2.00 s a step, 50 tokens/s: about 8.33 h and a peak of 2.00 GiB")
    assert command == ["-m", "sft_recipe.launch.local"] and heap == HEAP_SETTINGS["GLIBC_TUNABLES"]
    assert (trainer["total_training_steps"], trainer["save_freq"], trainer["test_freq"]) == (300, -1, -1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_failure_after_some_measured_steps_shows_the_error_of_the_rank(monkeypatch, tmp_path, device):
    check, (_, _, heap) = measured_by(monkeypatch, tmp_path, "error: no memory", device)
    assert check.message("en") == "the measured steps failed: error: no memory"
    assert (heap is None) == (device == "cuda")


def test_a_stopped_check_ends_the_run_that_it_measures(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "_is_enough", lambda rows: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        measured_by(monkeypatch, tmp_path, "", "cpu")
    assert caught.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    command_lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in command_lines if str(tmp_path / "python") in words]


@pytest.mark.slow
def test_measured_steps_predict_the_run(ask):
    _, report = ask("--measure")
    assert " s a step" in found(report, "measured")["message"] and found(report, "measured")["status"] == "ok"


def test_a_folder_with_another_run_is_an_error(ask, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    words = [f"trainer.output_dir={folder}"]
    assert ask(*words)[0] == 0
    (folder / "checkpoints/step_7").mkdir(parents=True)
    (folder / "checkpoints/step_7/manifest.json").write_text("{}")
    code, report = ask(*words)
    assert code == 2 and "holds step_7 of an earlier run" in found(report, "run folder")["message"]
    code, report = ask(*words, "trainer.resume_from=auto")
    assert code == 0 and "step_7 is damaged" in found(report, "run folder")["message"]
    code, report = ask(*words, "trainer.resume_from=nowhere")
    assert code == 2 and "no checkpoint" in found(report, "run folder")["message"]
    shutil.rmtree(folder / "checkpoints")
    held = "import sys; from pathlib import Path; from sft_recipe.checkpoint.run_lock import FolderLock; "
    held += "FolderLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", held, folder], stdin=-1, stdout=-1) as writer:
        writer.stdout.readline()
        code, report = ask(*words)
        writer.stdin.close()
    assert code == 2 and f"process {writer.pid} on " in found(report, "run folder")["message"]


@pytest.mark.parametrize(
    ("words", "warmup"),
    [
        (["optim.lr_warmup_steps=100"], 100),
        (["--warmup_ratio", "1.0"], 6),
        (["optim.lr_scheduler_type=onecycle", "optim.pct_start=0.99"], None),
        ([], None),
    ],
)
def test_a_warmup_as_long_as_the_run_is_a_warning(ask, words, warmup):
    _, report = ask("trainer.total_training_steps=6", *words)
    names = [check["name"] for check in report["checks"]]
    assert ("warm-up" in names) == (warmup is not None)
    if warmup:
        text = f"{warmup} steps of 6: the learning rate only rises"
        assert (found(report, "warm-up")["status"], found(report, "warm-up")["message"]) == ("warning", text)


def test_settings_that_another_machine_refuses_are_an_error(ask):
    code, report = ask("--gpus", "8", "--gpu_memory", "24GB", "trainer.device=auto", "--batch_size", "4")
    assert code == 2 and "BATCH_SIZE to 8 or more" in found(report, "settings")["message"]
    assert report["settings"]["trainer.n_gpus_per_node"] == 8


def test_train_sh_check_does_the_same(work, capsys):
    from sft_recipe.cli import train

    assert train.main(["--check", "--json", *arguments(work)]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
