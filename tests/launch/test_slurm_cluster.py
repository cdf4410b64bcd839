"""Jobs on a real SLURM cluster of two nodes, which are network namespaces."""

import pytest
from safetensors.torch import load_file

from tests.support import tiny
from tests.support.runs import metrics
from tests.support.slurm import slurm_cluster, why_not
from tests.support.small_run import arguments
from tests.support.two_machines import two_machines

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "")]
STEPS = 20
SETTINGS = ["trainer.total_epochs=4", "trainer.save_freq=-1", "trainer.heartbeat_timeout=600", "data.val_files=null"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with two_machines() as machines, slurm_cluster(machines, tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("model") / "model")


def final(folder):
    """Return the weights and the losses at the end of a run."""
    weights = load_file(folder / f"out/checkpoints/step_{STEPS}/huggingface/model.safetensors")
    return weights, [row["train/loss"] for row in metrics(folder / "out")]


def test_job_continues_after_its_time_limit_and_after_preemption(cluster, model, tmp_path):
    """The undisturbed run is submitted with options of sbatch, the other one by --launcher slurm."""
    plain = cluster.submit(
        "sbatch", "--nodes=2", "--gpus-per-node=1", "scripts/slurm.sbatch",
        *arguments(model, tmp_path / "plain", *SETTINGS),
    )  # fmt: skip
    cluster.wait_for(plain, "COMPLETED")

    words = arguments(model, tmp_path / "run", *SETTINGS)
    job = cluster.submit("./train.sh", "--launcher=slurm", "--nnodes=2", *words)
    cluster.wait(lambda: "step 3/" in cluster.output_of(job))
    with cluster.stands_still(job):
        cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=4")  # minutes; SLURM looks every 30 seconds
    cluster.wait(lambda: cluster.state(job)["Restarts"] == "1")
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert "Stopped at step" in cluster.output_of(job)

    cluster.wait(lambda: "resumed" in cluster.output_of(job) and len(cluster.ranks(job)) == 2)
    with cluster.stands_still(job):
        cluster.submit("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--wrap=true")
    cluster.wait(lambda: cluster.state(job)["Restarts"] == "2")
    cluster.wait_for(job, "COMPLETED")

    assert cluster.output_of(job).count("resumed") == 2
    (weights, losses), (expected, expected_losses) = final(tmp_path / "run"), final(tmp_path / "plain")
    assert losses == expected_losses
    assert weights.keys() == expected.keys() and all(weights[name].equal(expected[name]) for name in expected)


def test_sweep_is_an_array_and_a_cancelled_job_stays_cancelled(cluster, model, tmp_path):
    words = arguments(model, tmp_path / "run", *SETTINGS)
    array = cluster.submit("./train.sh", "--launcher=slurm", "--multirun", *words, "trainer.total_epochs=4,4000")
    second = cluster.state(f"{array}_1")["JobId"]
    cluster.wait(lambda: "step 3/" in cluster.output_of(second))
    cluster.command("scancel", f"{array}_1")
    cluster.wait_for(f"{array}_0", "COMPLETED")
    cluster.wait_for(f"{array}_1", "CANCELLED")
    assert "Stopped at step" in cluster.output_of(second)
    assert len(metrics(tmp_path / "run/out/0")) == STEPS
    assert list((tmp_path / "run/out/1/checkpoints").glob("step_*"))
