"""The script of a job of SLURM, with programs that stand for SLURM's; test_slurm_cluster.py has the real ones."""

import json
import os
import subprocess

import pytest

from sft_recipe.cli import report
from sft_recipe.cli.train import main
from tests.report.made import falling, make_run, noisy, write_run
from tests.support.runs import ROOT

SCRIPT = (ROOT / "scripts/slurm.sbatch").read_text()
SWEEP = ["--launcher", "slurm", "--multirun", "--lr", "1e-2,1e-3", "--output_dir", "/shared/a b"]


def printed(capsys, *words):
    """Return the script that a dry run prints."""
    assert main([*words, "--dry_run"]) == 0
    return capsys.readouterr().out


def options(script):
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that puts a shell script into PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name, text):
        path = folder / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def job(tmp_path, program):
    """Return a function that runs a script as SLURM would on node 0 of 2; returns what train.sh and scontrol got."""
    calls = tmp_path / "calls"

    def run(script, code=0, state="RUNNING", **variables):
        calls.unlink(missing_ok=True)
        train = program("train", f'printf "%s\\n" "$NNODES $NODE_RANK $MASTER_ADDR $N_GPUS" "$@" >{calls}; exit {code}')
        program("srun", 'while [[ $1 = --* ]]; do shift; done; SLURM_NODEID=0 exec "$@"')
        program("squeue", f"echo {state}")
        program("scontrol", f"[ $1 = show ] && printf 'nodea\\nnodeb\\n' || echo scontrol $@ >>{calls}")
        job = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[a-b]", "N_GPUS": "1", **variables}
        for name in (f"{ROOT}/train.sh", "./train.sh"):
            script = script.replace(f"train={name}\n", f"train={train}\n")
        done = subprocess.run(
            ["bash", "-s", "--", "--lr", "1"], input=script, env={**os.environ, **job}, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        return calls.read_text().splitlines()

    return run


def test_flags_become_options_of_sbatch_and_arguments(capsys, job):
    words = ["--nnodes", "2", "--n_gpus", "8"]
    words += ["--batch_size", "64", "--model", "a b", "trainer.output_dir=runs/${now:%Y}"]
    script = printed(capsys, "--launcher", "slurm", *words)
    assert options(script)[:3] == ["job-name=sft", "nodes=2", "gpus-per-node=8"]
    node, *arguments = job(script, SLURM_GPUS_ON_NODE="8")
    assert node == "2 0 nodea 8"
    assert arguments[:3] == ["trainer.n_gpus_per_node=8", "data.train_batch_size=64", "model.path='a b'"]
    assert arguments[3].startswith("trainer.output_dir=runs/20") and len(arguments) == 4


def test_jobs_on_the_cpu_need_no_gpus(capsys):
    script = printed(capsys, "--launcher", "slurm", "--n_gpus", "4", "trainer.device=cpu")
    assert options(script)[1:3] == ["nodes=1", "cpus-per-task=4"]


def test_a_sweep_is_an_array(capsys, job):
    script = printed(capsys, *SWEEP, "--epochs", "1")
    assert options(script)[1:4] == ["nodes=1", "gpus-per-node=1", "array=0-1"]
    for index, rate in enumerate(["0.01", "0.001"]):
        assert job(script, SLURM_ARRAY_TASK_ID=str(index))[1:] == [
            "trainer.total_epochs=1", f"optim.lr={rate}", f"trainer.output_dir='/shared/a b/{index}'",
        ]  # fmt: skip


def test_a_submitted_sweep_can_be_compared_by_its_folder(program, tmp_path, capsys, monkeypatch):
    program("sbatch", "cat >/dev/null; echo Submitted batch job 7")
    folder = tmp_path / "a b"
    assert main([*SWEEP[:-1], str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"scripts/report.py '{folder}' compares the runs")
    runs = json.loads((folder / "sweep.json").read_text())["runs"]
    values = [{"optim.lr": "0.01"}, {"optim.lr": "0.001"}]
    assert runs == [{"folder": str(index), "values": values[index]} for index in (0, 1)]
    assert report.main([str(folder)]) == 2
    assert "no run of this sweep has trained a step yet" in capsys.readouterr().err
    for index, rate in enumerate((1e-2, 1e-3)):
        write_run(folder / str(index), make_run(noisy(falling(40)), rate=rate))
    assert report.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.split()[:2] == ["0", "1"] and out.endswith(f"page: {folder}/report.html\n")
    assert "optim.lr" in (folder / "report.html").read_text()
    assert report.main([str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"] == {"optim.lr": [1e-2, 1e-3]}


def test_runs_of_a_sweep_have_the_same_resources(capsys):
    assert main([*SWEEP, "trainer.n_gpus_per_node=1,2"]) == 2
    assert "the jobs of a sweep under SLURM need the same nodes, GPUs and device" in capsys.readouterr().err


def test_secrets_stay_in_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "0123456789")
    script = printed(capsys, "--launcher", "slurm", "trainer.run_name=0123456789x")
    assert "0123456789" not in script and "${oc.env:MY_API_KEY}" in script


@pytest.mark.parametrize(
    ("code", "state", "variables", "queued"),
    [
        (75, "RUNNING", {}, ["17"]),
        (75, "RUNNING", {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, ["12_3"]),
        (143, "RUNNING", {}, ["17"]),
        (75, "COMPLETING", {}, []),
        (1, "RUNNING", {}, []),
        (0, "RUNNING", {}, []),
    ],
)
def test_stopped_job_is_queued_again_unless_it_was_cancelled(job, code, state, variables, queued):
    calls = job(SCRIPT, code, state, **variables)
    assert calls == ["2 0 nodea 1", "--lr", "1", *(f"scontrol requeue {number}" for number in queued)]


def test_submission(capsys, monkeypatch, program, tmp_path):
    words = ["--launcher", "slurm", "--lr", "1e-5"]
    expected = printed(capsys, *words)
    with monkeypatch.context() as context:
        context.setenv("PATH", f"{tmp_path}/bin")
        assert main(words) == 2
    assert "--launcher slurm needs the program sbatch of SLURM on this machine" in capsys.readouterr().err
    program("sbatch", f"cat >{tmp_path}/submitted; echo Submitted batch job 7")
    assert main(words) == 0
    assert (capsys.readouterr().out, (tmp_path / "submitted").read_text()) == ("Submitted batch job 7\n", expected)
    program("sbatch", "echo sbatch: error: invalid partition specified >&2; exit 1")
    assert main(words) == 2
    assert "error: the job was not submitted: sbatch: error: invalid partition" in capsys.readouterr().err


def test_configurations_are_checked_before_anything_is_submitted(capsys, program, tmp_path):
    program("sbatch", f"touch {tmp_path}/submitted")
    assert main(["--launcher", "slurm", "--nnodes", "9"]) == 2
    assert "BATCH_SIZE=4 is smaller than the number of ranks (9)" in capsys.readouterr().err
    assert not (tmp_path / "submitted").exists()
