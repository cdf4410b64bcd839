"""Runs as jobs of SLURM: `./train.sh --launcher slurm` submits scripts/slurm.sbatch with the flags filled in."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from typing import TYPE_CHECKING

from sft_recipe.errors import ConfigError, PreflightError

if TYPE_CHECKING:
    from sft_recipe.config.schema import Config

NODES, TRAIN = "#SBATCH --nodes=1\n", "train=./train.sh\n"  # lines of the script that are replaced


def script(configs: list[Config], arguments: list[str], runs: list[list[str]]) -> str:
    """Return the script of a job that runs train.sh with `arguments`, with the resources that `configs` need.

    The `runs` of a sweep are an array of jobs, each with the further arguments of its run. Raises ConfigError where
    they need different resources.
    """
    from sft_recipe.config.compose import HOME

    options = _resources(configs)
    lines = [f"train={shlex.quote(str(HOME / 'train.sh'))}", shlex.join(["set", "--", *arguments])]
    if runs:
        options.append(f"--array=0-{len(runs) - 1}")
        lines.append("case $SLURM_ARRAY_TASK_ID in")
        lines += [f'  {index}) set -- "$@" {shlex.join(run)} ;;' for index, run in enumerate(runs)]
        lines.append("esac")
    text = (HOME / "scripts/slurm.sbatch").read_text()
    for line, filled in ((NODES, [f"#SBATCH {option}" for option in options]), (TRAIN, lines)):
        assert text.count(line) == 1
        text = text.replace(line, "\n".join([*filled, ""]))
    return text


def submit(text: str) -> None:
    """Submit a script, and print the number of its job. Raises PreflightError without sbatch, or if that refuses."""
    if not shutil.which("sbatch"):
        raise PreflightError(
            "--launcher slurm needs the program sbatch of SLURM on this machine; "
            "with --dry_run it prints the script, which another machine can submit"
        )
    done = subprocess.run(["sbatch"], input=text, capture_output=True, text=True)
    if done.returncode:
        raise PreflightError(f"the job was not submitted: {done.stderr.strip()}")
    print(done.stdout.strip(), flush=True)


def _resources(configs: list[Config]) -> list[str]:
    """Return the options of sbatch for the nodes and what each needs: a GPU for each rank, or a CPU."""
    needed = {
        (config.trainer.nnodes, config.trainer.n_gpus_per_node, config.trainer.device == "cpu") for config in configs
    }
    if len(needed) > 1:
        raise ConfigError("the jobs of a sweep under SLURM need the same nodes, GPUs and device; submit several sweeps")
    nodes, ranks, is_cpu = needed.pop()
    return [f"--nodes={nodes}", f"--cpus-per-task={ranks}" if is_cpu else f"--gpus-per-node={ranks}"]
