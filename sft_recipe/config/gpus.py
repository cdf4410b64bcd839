"""Finds out why PyTorch does not use the GPUs of this machine, and which of PyTorch's builds would."""

import os
import re
from glob import glob
from pathlib import Path

import torch

from sft_recipe.errors import pip_install

NVIDIA_FILES = ("/dev/nvidia[0-9]*", "/usr/lib/wsl/lib/libcuda.so*")  # the second under WSL, whose devices have no file
AMD_FILES = ("/dev/kfd",)
DRIVER_FILE = Path("/proc/driver/nvidia/version")
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
WHEELS = "https://download.pytorch.org/whl"
# The oldest driver for PyTorch's builds, newest first, and the oldest GPU (its compute capability) they have code for.
BUILDS = (("cu130", 580, (7, 5)), ("cu126", 525, (5, 0)))
SHOWN_BY = {"NVIDIA": "nvidia-smi", "AMD": "rocm-smi"}
ON_CPU = "or train on the CPU with trainer.device=cpu"


def keep_one_list() -> str | None:
    """Remove repeated lists of visible GPUs from the environment; returns what is wrong with different ones.

    SLURM sets the variables of all vendors to the same list. verl refuses two, and AMD's count within each other.
    """
    given = {name: value for name in VISIBLE if (value := os.environ.get(name))}
    if len(set(given.values())) > 1:
        return f"{' and '.join(f'{name}={value}' for name, value in given.items())} differ: set only one of them"
    for name in list(given)[1:]:
        del os.environ[name]
    return None


def mps_notice() -> str | None:
    """Return a sentence for the owner of a Mac whose GPU PyTorch could use; None elsewhere."""
    if not torch.backends.mps.is_available():
        return None
    return "this Mac's GPU (MPS) is not supported: training runs on the CPU"


def missing_gpu_problem() -> str | None:
    """Return why PyTorch sees no GPU although this machine has one, and what to install; None if there is none.

    A variable such as CUDA_VISIBLE_DEVICES that hides the GPUs is no problem.
    """
    if any(os.environ.get(name, "0").strip() in ("", "-1") for name in VISIBLE):
        return None
    builds = {"NVIDIA": torch.version.cuda, "AMD": torch.version.hip}
    vendors = [name for name, files in (("NVIDIA", NVIDIA_FILES), ("AMD", AMD_FILES)) if _exist(files)]
    if not vendors:
        return None
    vendor = next((name for name in vendors if builds[name]), vendors[0])
    if not builds[vendor]:
        return (
            f"this machine has a GPU of {vendor}, but PyTorch {torch.__version__} is not built for it: "
            f"{_install(vendor, driver_version())}, {ON_CPU}"
        )
    return f"PyTorch {torch.__version__} cannot use this machine's {vendor} GPU: {_reason(vendor)}, {ON_CPU}"


def unusable_gpu_problem(count: int) -> str | None:
    """Return why PyTorch cannot compute on the first `count` GPUs that it sees, and what to do; None if it can."""
    try:
        torch.cuda.init()
    except Exception as error:  # of the driver, as text
        vendor, runtime = ("AMD", "ROCm") if torch.version.hip else ("NVIDIA", "CUDA")
        return f"PyTorch {torch.__version__} cannot start {runtime}: {_reason(vendor, error)}, {ON_CPU}"
    if torch.version.hip:
        return None
    for number in range(count):
        capability = torch.cuda.get_device_capability(number)
        if not has_kernels(capability, torch.cuda.get_arch_list()):
            name = torch.cuda.get_device_name(number)
            return (
                f"PyTorch {torch.__version__} has no code for the {name} (compute capability "
                f"{capability[0]}.{capability[1]}): {_install('NVIDIA', driver_version(), capability)}, {ON_CPU}"
            )
    return None


def has_kernels(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Return whether code for `architectures`, such as sm_80 and compute_120, runs on a GPU of this capability.

    Binary code (sm) runs on the same major version with the same or a later minor one, PTX (compute) on all later ones.
    An empty list, of a build that does not say, counts as yes.
    """
    for text in architectures:
        kind, _, number = text.partition("_")
        version = int(re.sub(r"\D", "", number)[:-1]), int(re.sub(r"\D", "", number)[-1])
        if (kind == "compute" and version <= capability) or (version[0] == capability[0] and version <= capability):
            return True
    return not architectures


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, such as 535.104.05; None where it is not known."""
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", DRIVER_FILE.read_text())
    except OSError:
        return None
    return found and found[0]


def _exist(patterns: tuple[str, ...]) -> bool:
    return any(glob(pattern) for pattern in patterns)


def _reason(vendor: str, error: Exception | None = None) -> str:
    if error is None:
        try:
            torch.cuda.init()
            return f"its driver names no device; see whether {SHOWN_BY[vendor]} shows one"
        except Exception as raised:  # of the driver, as text
            error = raised
    driver = driver_version()
    if vendor == "NVIDIA" and ("driver" in str(error) and "old" in str(error) or _is_too_old(driver)):
        return f"its driver{f' {driver}' if driver else ''} is too old: {_install(vendor, driver)}"
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"{first}; see whether {SHOWN_BY[vendor]} shows it"


def _is_too_old(driver: str | None) -> bool:
    needed = BUILDS[0][1] if (torch.version.cuda or "").startswith("13") else BUILDS[-1][1]
    return driver is not None and int(driver.partition(".")[0]) < needed


def _install(vendor: str, driver: str | None, capability: tuple[int, int] = (99, 0)) -> str:
    version = torch.__version__.partition("+")[0]
    if vendor == "AMD":
        return f"install the build for ROCm that https://pytorch.org/get-started names, of version {version}"
    major = int(driver.partition(".")[0]) if driver else BUILDS[0][1]
    for build, oldest_driver, oldest_gpu in BUILDS:
        if major >= oldest_driver and capability >= oldest_gpu:
            return pip_install(f"--force-reinstall torch=={version} --index-url {WHEELS}/{build}")
    return f"update the driver to {BUILDS[0][1]} or newer"
