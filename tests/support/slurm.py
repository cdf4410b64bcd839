"""A SLURM cluster of the two machines of two_machines.py: Debian's slurmctld and slurmd.

with two_machines() as machines, slurm_cluster(machines, folder) as cluster:
    job = cluster.submit("sbatch", ...)
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.support import two_machines
from tests.support.runs import ROOT
from tests.support.two_machines import Machine, Run

PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "nsenter": "util-linux"}
# Requeued jobs start after `cred_expire` seconds. GPUs without files are counted, and nothing else.
SETTINGS = """\
ClusterName=tests
SlurmctldHost={first}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Return why no cluster can be built here, or None."""
    missing = [package for program, package in PROGRAMS.items() if not shutil.which(program, path=_path())]
    if missing:
        return f"needs Debian's {', '.join(missing)}"
    return two_machines.why_not()


class Cluster:
    """The two machines, and the folder with the configuration and the output of the daemons."""

    def __init__(self, machines: tuple[Machine, Machine], folder: Path):
        self.machines, self.folder = machines, folder
        self.environment = {
            **os.environ, "PATH": _path(), "SLURM_CONF": f"{folder}/slurm.conf", "VIRTUAL_ENV": sys.prefix,
            "SBATCH_OUTPUT": f"{folder}/%j.out", "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
        }  # fmt: skip

    def start(self) -> None:
        """Start the daemons and wait for both nodes."""
        first, second = self.machines
        nodes = [
            f"NodeName={machine.hostname} NodeAddr={machine.address} CPUs=2 RealMemory=1000 Gres=gpu:1 State=UNKNOWN"
            for machine in self.machines
        ]
        text = SETTINGS.format(
            first=first.hostname, address=first.address, folder=self.folder, nodes="\n".join(nodes)
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "state").mkdir()
        for machine in self.machines:
            machine.set_hosts(f"{first.address} {first.hostname}", f"{second.address} {second.hostname}")
        self._daemon(first, "slurmctld", "-D", "-c")
        for machine in self.machines:
            self._daemon(machine, "slurmd", "-D", "-N", machine.hostname)
        self.wait(lambda: self.command("sinfo", "-h", "-o", "%T %D").strip() == "idle 2", 30)

    def _daemon(self, machine: Machine, *command: str) -> None:
        machine.runs.append(Run(self._on(machine, *command), self.environment))

    def _on(self, machine: Machine, *command: str) -> list[str]:
        """`ip netns exec` would hide /sys/fs/cgroup, which slurmd needs."""
        names = ["nsenter", f"--net=/run/netns/{machine.namespace}", "unshare", "--uts", "--mount", "bash", "-c"]
        hosts = f"mount --bind /etc/netns/{machine.namespace}/hosts /etc/hosts"
        return [*names, f'hostname {machine.hostname} && {hosts} && exec "$@"', "_", *command]

    def command(self, *words: str) -> str:
        """Run a program on the first machine, in this repository; returns what it prints."""
        done = subprocess.run(
            self._on(self.machines[0], *words), cwd=ROOT, env=self.environment, capture_output=True, text=True
        )
        assert not done.returncode, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str) -> str:
        """Submit a job with sbatch or train.sh; returns its number."""
        return self.command(*words).split("Submitted batch job ")[1].split()[0]

    def output_of(self, job: str) -> str:
        """Return what a job has printed."""
        path = self.folder / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def ranks(self, job: str) -> list[psutil.Process]:
        """Return the processes of the ranks of a job that torchrun has started."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                variables = process.environ()
                if "RANK" in variables and variables.get("SLURM_JOB_ID") == job:
                    found.append(process)
        return found

    @contextmanager
    def stands_still(self, job: str) -> Iterator[None]:
        """Suspend the ranks of a job until SLURM sends them a signal, so that a test does not depend on their speed."""
        ranks = self.ranks(job)
        for rank in ranks:
            rank.suspend()
        yield
        self.wait(lambda: any(_is_signalled(rank) for rank in ranks))
        for rank in ranks:
            rank.resume()

    def state(self, job: str) -> dict[str, str]:
        """Return what scontrol says about a job."""
        words = self.command("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, state: str) -> None:
        """Wait until a job has ended in a state."""

        def has_ended() -> bool:
            found = self.state(job)["JobState"]
            assert found in (state, "PENDING", "RUNNING", "COMPLETING", "PREEMPTED"), f"{found}: {self.output()}"
            return found == state

        self.wait(has_ended)

    def wait(self, condition, seconds: float = 180.0) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.output()
            time.sleep(0.3)

    def kill(self) -> None:
        """Kill the daemons and the jobs, which are no children of theirs."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    process.kill()

    def output(self) -> str:
        """Return what the daemons have printed, and the jobs."""
        runs = [run.output for machine in self.machines for run in machine.runs]
        return "\n".join([*runs, *(path.read_text() for path in self.folder.glob("*.out"))])


@contextmanager
def slurm_cluster(machines: tuple[Machine, Machine], folder: Path) -> Iterator[Cluster]:
    """Run the daemons for the duration of the context; two_machines ends them. `folder` is empty."""
    cluster = Cluster(machines, folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill()


def _is_signalled(process: psutil.Process) -> bool:
    """Return whether a suspended process has a pending SIGTERM, or has gone on."""
    pending = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return bool(int(pending[1], 16) >> signal.SIGTERM - 1 & 1) or process.status() != psutil.STATUS_STOPPED


def _path() -> str:
    return f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
