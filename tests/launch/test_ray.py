"""Runs on a real Ray cluster of two machines, which are network namespaces."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.support import tiny
from tests.support.runs import metrics
from tests.support.small_run import arguments, checkpoints
from tests.support.two_machines import two_machines, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "")]
RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6379


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Return the two machines of a cluster, and the variables with which a driver finds it."""
    folder = Path("/tmp") / f"ray{os.getpid()}"  # the paths of Ray's sockets are short
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    node = ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--block"]
    with two_machines() as (first, second):
        address = f"{first.address}:{PORT}"
        first.run(
            [RAY, "start", "--head", f"--node-ip-address={first.address}", f"--port={PORT}", f"--temp-dir={folder}"]
            + ["--include-dashboard=true", f"--dashboard-host={first.address}", *node],
            **quiet,
        ).wait_for("Ray runtime started")
        second.run(
            [RAY, "start", f"--address={address}", f"--node-ip-address={second.address}", *node], **quiet
        ).wait_for("Ray runtime started")
        yield first, second, {"RAY_ADDRESS": address, **quiet}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("ray") / "model")


def start(cluster, model, folder, *extra):
    first, _, variables = cluster
    return first.start([*arguments(model, folder, *extra)], module="sft_recipe.launch.ray", **variables)


def test_two_machines_train_as_without_ray(cluster, model, tmp_path):
    run = start(cluster, model, tmp_path / "ray", "trainer.nnodes=2")
    assert run.end() == 0, run.output
    with two_machines() as machines:
        pair = [
            machine.start(
                ["--nnodes=2", f"--node_rank={node}", f"--master_addr={machines[0].address}"]
                + arguments(model, tmp_path / "plain")
            )
            for node, machine in enumerate(machines)
        ]
        assert [run.end() for run in pair] == [0, 0], pair[0].output
    found, expected = (
        load_file(tmp_path / name / "out/checkpoints/step_10/huggingface/model.safetensors")
        for name in ("ray", "plain")
    )
    assert all(found[name].equal(expected[name]) for name in expected)
    assert run.output.count("step 10/10") == 1


LONG = "trainer.total_epochs=400"


def test_stop_saves_and_resumes(cluster, model, tmp_path):
    run = start(cluster, model, tmp_path / "run", "trainer.nnodes=2", LONG)
    run.wait_for("step 3/")
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 75, run.output
    assert "Continue with --resume_from auto" in run.output


def test_stopped_job_saves(cluster, model, tmp_path):
    """`ray job stop` kills after RAY_JOB_STOP_WAIT_TIME_S, by default 3 seconds."""
    first, _, variables = cluster
    variables = {**variables, "RAY_API_SERVER_ADDRESS": f"http://{first.address}:8265"}
    patience = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}})
    submit = [RAY, "job", "submit", "--submission-id=run", "--working-dir=.", f"--runtime-env-json={patience}", "--"]
    driver = [sys.executable, "-m", "sft_recipe.launch.ray", "trainer.nnodes=2"]
    job = first.run([*submit, *driver, *arguments(model, tmp_path / "run", LONG)], **variables)
    job.wait_for("step 3/")
    stop = first.run([RAY, "job", "stop", "run"], **variables)
    assert stop.end() == 0, stop.output
    job.end()
    assert "Job 'run' was stopped" in stop.output and "Continue with --resume_from auto" in job.output
    last = metrics(tmp_path / "run/out")[-1]["step"]  # a step that was stopped in its validation has no row yet
    assert {f"step_{last}", f"step_{last + 1}"} & {*checkpoints(tmp_path / "run")}


def test_runs_of_a_sweep_share_the_cluster(cluster, model, tmp_path):
    first, _, variables = cluster
    words = ["--launcher=ray", "--multirun", "optim.lr=1e-2,1e-3", "trainer.total_epochs=1"]
    run = first.start([*arguments(model, tmp_path / "run"), *words], **variables)
    assert run.end() == 0, run.output
    assert run.output.index("run 1 of 2") < run.output.index("[0]")  # there is a CPU for each of two runs
    runs = json.loads((tmp_path / "run/out/sweep.json").read_text())["runs"]
    assert [run["values"] for run in runs] == [{"optim.lr": "0.01"}, {"optim.lr": "0.001"}]
    for run in runs:
        rows = metrics(tmp_path / "run/out" / run["folder"])
        assert (run["exit_code"], run["train/loss"]) == (0, rows[-1]["train/loss"])
    assert "<svg" in (tmp_path / "run/out/report.html").read_text()


def test_ranks_end_with_a_killed_driver(cluster, model, tmp_path):
    run = start(cluster, model, tmp_path / "run", LONG)
    run.wait_for("step 3/")
    run.kill()
    left = f"{tmp_path}/run"

    def ranks():
        return [p.pid for p in psutil.process_iter(["environ", "cmdline"]) if left in str(p.info["cmdline"])]

    gone = time.monotonic() + 60
    while ranks() and time.monotonic() < gone:
        time.sleep(0.5)
    assert not ranks()


def test_missing_resources_are_named(cluster, model, tmp_path):
    run = start(cluster, model, tmp_path / "run", "trainer.nnodes=2", "trainer.n_gpus_per_node=8")
    assert run.end() == 2, run.output
    assert "trainer.nnodes=2 needs as many machines with 8 CPUs each; the cluster has" in run.output
    assert "nodea: 0 GPUs, 1 CPUs" in run.output and "nodeb: 0 GPUs, 1 CPUs" in run.output


def test_lost_machine_restarts_the_run_on_what_is_left(cluster, model, tmp_path):
    """The last test: it ends the second machine."""
    _, second, _ = cluster
    settings = ["trainer.total_epochs=20", "fsdp.mixed_precision.param_dtype=fp32"]
    expected = start(cluster, model, tmp_path / "one", *settings)
    assert expected.end() == 0, expected.output
    run = start(cluster, model, tmp_path / "run", *settings, "trainer.nnodes=2", "trainer.auto_restart=1")
    run.wait_for("step 12/")
    second.runs[0].kill()
    assert run.end(400) == 0, run.output
    assert "restart 1 of 1 on 1 machine" in run.output and "machine nodeb was lost" in run.output
    losses = [[row["train/loss"] for row in metrics(tmp_path / name / "out")] for name in ("one", "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
