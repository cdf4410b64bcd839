"""The memory that this process may use: of the machine, and of control groups of both versions, made of files here."""

import psutil
import pytest

from sft_recipe.distributed import host_memory

GIB = 2**30


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Return a function: lines of /proc/self/cgroup and files below /sys/fs/cgroup, all made here."""
    monkeypatch.setattr(host_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path / "sys")
    machine = psutil.virtual_memory()._replace(total=64 * GIB, available=40 * GIB)
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: machine)

    def write(lines: list[str], files: dict[str, object]) -> None:
        (tmp_path / "proc").write_text("".join(f"{line}\n" for line in lines))
        for name, content in files.items():
            path = tmp_path / "sys" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    return write


def test_without_a_limit_it_is_that_of_the_machine(cgroups):
    assert (host_memory.total_memory(), host_memory.available_memory()) == (64 * GIB, 40 * GIB)
    cgroups(["0::/"], {"memory.current": 50 * GIB})  # the root of a machine has no limit
    assert (host_memory.total_memory(), host_memory.available_memory()) == (64 * GIB, 40 * GIB)
    cgroups(["0::/job"], {"job/memory.max": "max", "job/memory.current": 50 * GIB})
    assert (host_memory.total_memory(), host_memory.available_memory()) == (64 * GIB, 40 * GIB)


def test_version_2_in_a_container_and_in_a_job(cgroups):
    stat = f"anon 5\nfile 9\ninactive_file {GIB}\nactive_file 7"
    cgroups(["0::/"], {"memory.max": 8 * GIB, "memory.current": 3 * GIB, "memory.stat": stat})
    assert (host_memory.total_memory(), host_memory.available_memory()) == (8 * GIB, 6 * GIB)
    cgroups(["0::/slurm/job_7/step"], {"slurm/job_7/step/memory.max": "max", "slurm/job_7/memory.max": 4 * GIB})
    cgroups(["0::/slurm/job_7/step"], {"slurm/job_7/memory.current": GIB // 2})
    assert (host_memory.total_memory(), host_memory.available_memory()) == (4 * GIB, 4 * GIB - GIB // 2)


def test_version_1_whose_path_is_outside_of_the_container(cgroups):
    lines = ["12:cpu,cpuacct:/docker/abc", "4:memory:/docker/abc", "1:name=systemd:/docker/abc", "0::/"]
    names = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")
    stat = f"inactive_file 1\ntotal_inactive_file {GIB}"
    cgroups(lines, dict(zip(names, (16 * GIB, 10 * GIB, stat), strict=True)))
    assert (host_memory.total_memory(), host_memory.available_memory()) == (16 * GIB, 7 * GIB)
    # no limit is a number there
    cgroups(lines, {names[0]: 2**63 - 4096})
    assert (host_memory.total_memory(), host_memory.available_memory()) == (64 * GIB, 40 * GIB)
    cgroups(lines, {"memory/docker/abc/memory.limit_in_bytes": 2 * GIB})
    assert host_memory.total_memory() == 2 * GIB


def test_a_group_that_uses_more_than_its_limit_has_nothing_left(cgroups):
    cgroups(["0::/"], {"memory.max": GIB, "memory.current": 2 * GIB})
    assert host_memory.available_memory() == 0
