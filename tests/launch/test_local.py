"""The launcher restarts failed ranks, forwards signals, and ranks never outlive it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from sft_recipe.config.compose import load_config
from sft_recipe.launch import local
from tests.support import tiny
from tests.support.runs import ROOT, metrics
from tests.support.small_run import arguments, checkpoints

PATIENCE = 600  # seconds until a test gives up


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("launched") / "model")


@pytest.fixture
def launch(tmp_path):
    """Return a function that starts a launcher; launcher n writes to `output-n`. All end with the test."""
    started = []

    def start(*command, **environment):
        output = (tmp_path / f"output-{len(started)}").open("w")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        process = subprocess.Popen(
            [sys.executable, "-m", "sft_recipe.cli.train", *command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            for rank in psutil.Process(process.pid).children(recursive=True):
                rank.kill()
        process.kill()
        process.wait()


def wait_for(condition, *processes):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)


def rows(folder):
    return metrics(folder / "out") if (folder / "out/metrics.jsonl").is_file() else []


def ranks_of(launcher):
    ranks = [process for process in psutil.Process(launcher.pid).children() if "RANK" in process.environ()]
    return sorted(ranks, key=lambda process: process.environ()["RANK"])


def test_failed_rank_is_restarted_and_signals_reach_all_ranks(launch, model, tmp_path):
    """Checkpoints are saved on request only, so that nothing depends on how fast steps are.

    The run folder is named after the time, which all ranks and a restart have in common.
    """
    endless = ["trainer.n_gpus_per_node=2", "trainer.total_training_steps=1000000", "trainer.save_freq=-1"]
    named = f"trainer.output_dir={tmp_path}/runs/${{now:%H-%M-%S-%f}}/out"
    process = launch("--auto_restart", "2", *arguments(model, tmp_path, *endless, "data.val_files=null", named))
    output = tmp_path / "output-0"
    wait_for(lambda: any(tmp_path.glob("runs/*")), process)
    (folder,) = (tmp_path / "runs").iterdir()
    wait_for(lambda: len(rows(folder)) >= 2, process)
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: saves(output) == 1, process)
    first, second = ranks_of(process)
    second.kill()
    first.wait(PATIENCE)
    wait_for(lambda: "resumed" in output.read_text(), process)
    reached = len(rows(folder))
    wait_for(lambda: len(rows(folder)) > reached, process)
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: saves(output) == 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 75, output.read_text()
    assert [*(tmp_path / "runs").iterdir()] == [folder]
    steps = [row["step"] for row in rows(folder)]
    assert steps == list(range(1, len(steps) + 1))
    assert f"step_{steps[-1]}" in checkpoints(folder)
    assert "aborts: a peer rank exited" in output.read_text() and "Traceback" not in output.read_text()


def saves(output):
    """Count the saves that a run has reported."""
    return sum(line.startswith("saved ") for line in output.read_text().splitlines())


@pytest.mark.slow
def test_ranks_end_with_their_launcher(launch, model, tmp_path):
    endless = ["trainer.n_gpus_per_node=2", "trainer.total_training_steps=1000000", "trainer.save_freq=-1"]
    process = launch(*arguments(model, tmp_path, *endless))
    wait_for(lambda: len(rows(tmp_path)) >= 1, process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    process.kill()
    assert psutil.wait_procs(ranks, timeout=PATIENCE)[1] == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_stop_sent_to_all_processes_saves(launch, model, tmp_path, ranks):
    """As the end of a SLURM step does it; the launcher sends it to the ranks once more."""
    endless = [f"trainer.n_gpus_per_node={ranks}", "trainer.total_training_steps=1000000", "trainer.save_freq=-1"]
    process = launch(*arguments(model, tmp_path, *endless, "data.val_files=null"))
    wait_for(lambda: len(rows(tmp_path)) >= 1, process)
    for one in [*psutil.Process(process.pid).children(), psutil.Process(process.pid)]:
        one.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 75, (tmp_path / "output-0").read_text()
    assert checkpoints(tmp_path) == [f"step_{rows(tmp_path)[-1]['step']}"]


def test_stop_before_training_ends_the_restarts(launch, model, tmp_path):
    short = ["trainer.n_gpus_per_node=2", "trainer.total_training_steps=2", "data.val_files=null"]
    process = launch("--auto_restart", "2", *arguments(model, tmp_path, *short))
    wait_for(lambda: len(ranks_of(process)) == 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 143, (tmp_path / "output-0").read_text()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_while_data_is_tokenized_says_so_once(launch, model, tmp_path, ranks):
    many = [f"data.train_files={tmp_path}/many.json", "data.num_workers=2", f"trainer.n_gpus_per_node={ranks}"]
    run = arguments(model, tmp_path, *many)
    records = [{"prompt": f"What is {i} and {i}?", "response": f"It is {2 * i}. " * 20} for i in range(60_000)]
    (tmp_path / "many.json").write_text(json.dumps(records))
    process = launch(*run)
    wait_for(lambda: any(tmp_path.glob("cache/tokens/[!.]*.partial-*")), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    assert (tmp_path / "output-0").read_text() == "stopped by SIGINT before training started\n"


@pytest.mark.parametrize("ranks", [1, 2])
def test_failed_run_leaves_no_temporary_files(launch, model, tmp_path, ranks):
    (tmp_path / "tmp").mkdir()
    missing = [f"data.train_files={tmp_path}/missing.json", f"trainer.n_gpus_per_node={ranks}"]
    process = launch(*arguments(model, tmp_path, *missing), TMPDIR=str(tmp_path / "tmp"))
    assert process.wait(PATIENCE) == 2
    assert (tmp_path / "output-0").read_text().count("missing.json") == 1
    assert [path.name for path in (tmp_path / "tmp").iterdir() if path.name.startswith(("sft", "torch"))] == []


@pytest.mark.parametrize("ends", ["the rank is killed", "the launcher is killed", "a Ctrl-C"])
def test_single_rank_ends_like_one_of_several(launch, model, tmp_path, ends):
    endless = ["trainer.total_training_steps=1000000", "trainer.save_freq=-1", "data.val_files=null"]
    process = launch(*arguments(model, tmp_path, *endless))
    wait_for(lambda: len(rows(tmp_path)) >= 1, process)
    (rank,) = psutil.Process(process.pid).children()
    if ends == "a Ctrl-C":
        assert os.getpgid(rank.pid) != os.getpgid(process.pid)  # a terminal's would come twice, which ends it at once
        process.send_signal(signal.SIGINT)
    else:
        psutil.Process(process.pid if ends == "the launcher is killed" else rank.pid).kill()
    code = process.wait(PATIENCE)
    assert psutil.wait_procs([rank], timeout=PATIENCE)[1] == []
    assert code == {"the rank is killed": 137, "the launcher is killed": -9, "a Ctrl-C": 75}[ends]
    if ends == "the rank is killed":
        last_line = (tmp_path / "output-0").read_text().splitlines()[-1]
        assert last_line == "error: rank 0 of this machine was killed by SIGKILL (out of memory?)"


@pytest.mark.parametrize("moment", ["while data is prepared", pytest.param("in training", marks=pytest.mark.slow)])
def test_failure_on_one_machine_ends_the_other_with_the_reason(launch, model, tmp_path, moment):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    rendezvous = ["--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    run = arguments(model, tmp_path, "trainer.total_training_steps=1000000", "data.val_files=null")
    missing = [f"data.train_files={tmp_path}/missing.json"] if moment == "while data is prepared" else []
    first, second = (
        launch(*rendezvous, "--node_rank", "0", *run),
        launch(*rendezvous, "--node_rank", "1", *run, *missing),
    )
    if not missing:
        wait_for(lambda: len(rows(tmp_path)) >= 2, first, second)
        ranks_of(second)[0].kill()
    codes = first.wait(PATIENCE), second.wait(PATIENCE)
    output = [(tmp_path / f"output-{number}").read_text() for number in (0, 1)]
    if missing:
        assert codes == (2, 2), output
        assert "missing.json" in output[0] and f"rank 1 on {socket.gethostname()} stopped" in output[0], output
    else:
        assert codes == (1, 137), output
        assert "aborts: a peer rank exited" in output[0] and "rank 0 of this machine was killed" in output[1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_allocator_is_set_before_a_rank_starts_and_the_users_setting_is_kept(monkeypatch, ranks):
    """PyTorch reads the variable when CUDA starts, in the ranks."""
    seen = []
    for name in local.ALLOCATOR_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(local, "_fork", lambda _: seen.append(os.environ.get("PYTORCH_ALLOC_CONF")) or 0)
    monkeypatch.setattr(local, "_torchrun", lambda _: seen.append(os.environ.get("PYTORCH_ALLOC_CONF")) or 0)
    config = load_config([f"trainer.n_gpus_per_node={ranks}", "data.train_batch_size=2"])
    assert local.start_ranks(config) == 0 and seen == ["expandable_segments:True"]
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_HIP_ALLOC_CONF", "max_split_size_mb:64")
    assert local.start_ranks(config) == 0 and seen[1] is None
