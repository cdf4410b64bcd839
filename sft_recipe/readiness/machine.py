"""Checks of this machine: GPUs and their driver, shared memory, limits, disk, network, packages, loggers."""

import os
import resource
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import torch

from sft_recipe.config import gpus, preflight
from sft_recipe.config.schema import Config
from sft_recipe.display import byte_size
from sft_recipe.distributed.host_memory import total_memory
from sft_recipe.errors import CheckpointError, PreflightError, RecipeError
from sft_recipe.models.memory_estimate import GIB
from sft_recipe.readiness.findings import Check, failed, passed, warned
from sft_recipe.readiness.run_folder import check_writable, existing
from sft_recipe.tracking.loggers import check_loggers

SHARED_MEMORY = Path("/dev/shm")
ENOUGH_SHARED_MEMORY = GIB  # per machine with several ranks, for NCCL and the tokenizers' processes
ENOUGH_FILES = 4096
WRITTEN = 2**26  # bytes, to measure the disk
SLOW_DISK = 100 * 2**20  # bytes per second
PACKAGES = ("torch", "verl", "transformers", "peft", "flash-attn", "bitsandbytes")


def machine_checks(config: Config) -> Iterator[Check]:
    """Yield the checks of the machine on which the run would start."""
    yield _device(config)
    yield from _interconnect(config)
    yield _shared_memory(config)
    yield _open_files()
    yield _disk_speed(config)
    yield from _interfaces(config)
    yield _packages()
    yield from _loggers(config)


def _device(config: Config) -> Check:
    try:
        device = preflight.choose_device(config)
        preflight.check(config, device)
    except RecipeError as error:
        return failed("device", "{error}", error=error)
    if device == "cpu":
        memory = total_memory() / GIB
        text = "no GPU: {ranks:# rank} on the CPU, {cores:# core}, {memory:.1f} GiB of memory"
        if gpus.mps_notice():
            text = "this Mac's GPU (MPS) is not supported: {ranks:# rank} on its CPU, {cores:# core}, {memory:.1f} GiB"
        cores, ranks = os.cpu_count(), config.trainer.n_gpus_per_node
        return passed("device", text, ranks=ranks, cores=cores, memory=memory)
    properties: Any = torch.cuda.get_device_properties(0)
    if torch.version.hip:
        return passed(
            "device",
            "{count} x {name}, {memory:.1f} GiB, {architecture}; ROCm {version}",
            count=torch.cuda.device_count(), name=properties.name, memory=properties.total_memory / GIB,
            architecture=properties.gcnArchName.partition(":")[0], version=torch.version.hip,
        )  # fmt: skip
    return passed(
        "device",
        "{count} x {name}, {memory:.1f} GiB, compute capability {major}.{minor}; driver {driver}, CUDA {cuda}",
        count=torch.cuda.device_count(), name=properties.name, memory=properties.total_memory / GIB,
        major=properties.major, minor=properties.minor, driver=gpus.driver_version() or "?",
        cuda=torch.version.cuda,
    )  # fmt: skip


def _interconnect(config: Config) -> Iterator[Check]:
    count = torch.cuda.device_count()
    if config.trainer.device == "cpu" or count < 2 or config.trainer.n_gpus_per_node < 2:
        return
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    if all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs):
        yield passed("interconnect", "GPUs read each other's memory directly")
    else:
        yield warned(
            "interconnect",
            "GPUs cannot read each other's memory: collectives go through the host, which is slower",
            "exchange less often: a larger --micro_batch_size, fsdp.reshard_after_forward=false if memory allows",
        )


def _shared_memory(config: Config) -> Check:
    try:
        size = shutil.disk_usage(SHARED_MEMORY).total
    except OSError:
        size = 0
    if size >= ENOUGH_SHARED_MEMORY or config.trainer.n_gpus_per_node == 1:
        return passed("shared memory", "/dev/shm has {size:.1f} GiB", size=size / GIB)
    return failed(
        "shared memory",
        "/dev/shm has {size:.2f} GiB, too little for the ranks of this machine to communicate",
        "start the container with --ipc=host or --shm-size=8g",
        size=size / GIB,
    )


def _open_files() -> Check:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= ENOUGH_FILES:
        return passed("limits", "up to {limit} open files", limit=limit if limit >= 0 else "unlimited")
    return warned("limits", "only {limit} open files are allowed", "ulimit -n 65536", limit=limit)


def _disk_speed(config: Config) -> Check:
    remedy = "--output_dir ANOTHER_FOLDER"
    try:
        check_writable(config.trainer.run_folder)
    except CheckpointError as error:
        return failed("output folder", "{error}", remedy, error=error)
    folder = existing(config.trainer.run_folder)
    path = folder / f".sft_recipe-{uuid4().hex[:12]}"
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            file.write(os.urandom(WRITTEN))
            os.fsync(file.fileno())
        speed = WRITTEN / (time.perf_counter() - began)
    except OSError as error:
        return failed(
            "output folder", "{folder} cannot be written: {error}", remedy,
            folder=folder, error=error.strerror or error,
        )  # fmt: skip
    finally:
        path.unlink(missing_ok=True)
    text, free = "{folder}: {free} free, {speed:.0f} MB/s written", byte_size(shutil.disk_usage(folder).free)
    found = dict(folder=folder, free=free, speed=speed / 1e6)
    if speed < SLOW_DISK:
        text, found = text + ", which is slow: below {limit:.0f} MB/s", found | dict(limit=SLOW_DISK / 1e6)
        return warned("output folder", text, "save less often (trainer.save_freq), or use a local disk", **found)
    return passed("output folder", text, **found)


def _interfaces(config: Config) -> Iterator[Check]:
    if config.trainer.nnodes == 1:
        return
    up = [name for name, state in psutil.net_if_stats().items() if state.isup and name != "lo"]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        chosen = os.environ.get(variable, "")
        prefix = chosen.lstrip("=^")
        if not chosen:
            text = "{variable} is not set; the interfaces here are {names}"
            yield passed("network", text, variable=variable, names=", ".join(up))
        elif any(name.startswith(prefix) for name in up):
            yield passed("network", "{variable}={chosen}", variable=variable, chosen=chosen)
        else:
            yield failed(
                "network", "{variable}={chosen} names no interface that is up; here are {names}",
                "export {variable}=NAME", variable=variable, chosen=chosen, names=", ".join(up),
            )  # fmt: skip


def _packages() -> Check:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return passed("packages", "{names}", names=", ".join(found))


def _loggers(config: Config) -> Iterator[Check]:
    try:
        check_loggers(config)
    except PreflightError as error:
        yield failed("loggers", "{error}", "", error=error)
