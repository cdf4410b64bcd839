"""verl's platform plug-in for CPUs: gloo for collectives, resident memory for memory, nothing to synchronise.

Must be registered before anything of verl's engine is imported, and must not import the engine itself.
"""

import contextlib
import ctypes
import os
import time
from types import ModuleType
from typing import Any

import psutil
import torch
from verl.plugin.platform import get_platform
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

# How many matrix products of other shapes oneDNN, and PyTorch before it, remember. Unless told, that is 1,024, and as
# each is made in the middle of a step, their small pieces keep the heap from being whole again after it.
SHAPE_CACHE_SIZES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "32"}

# Of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST = 2**30, 2**25  # bytes that one tensor may have to come from the heap; what glibc before 2.35 takes
NEVER = -1


class _CpuModule(ModuleType):
    """`torch.cpu` with the names of `torch.cuda` that verl calls."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return os.cpu_count() or 1

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def set_device(self, *_: Any) -> None:
        pass

    def get_device_name(self, *_: Any) -> str:
        return "cpu"

    def synchronize(self, *_: Any) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def reset_peak_memory_stats(self, *_: Any) -> None:
        pass

    def memory_allocated(self, *_: Any) -> int:
        return psutil.Process().memory_info().rss

    memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total


class PlatformCPU(PlatformBase):
    """A machine without an accelerator."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _CpuModule("torch.cpu")

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")

    def device_count(self) -> int:
        return os.cpu_count() or 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "SFT_CPU_RANKS"

    def nvtx_range(self, msg: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def use_cpu() -> None:
    """Make the CPU verl's platform in this process.

    Raises RuntimeError where verl has settled on another platform already.
    """
    os.environ["VERL_PLATFORM"] = "cpu"
    PlatformRegistry.register(platform="cpu")(PlatformCPU)
    if get_platform().device_name != "cpu":
        raise RuntimeError(f"verl chose the platform {get_platform().device_name} before the CPU was registered")
    for name, count in SHAPE_CACHE_SIZES.items():
        os.environ.setdefault(name, count)
    tune_malloc()


def tune_malloc() -> None:
    """Let all threads allocate from one heap that keeps what it has, where the C library is glibc.

    It gives each thread its own, and what one has freed another cannot use. And it gives large pieces back to the
    system, which has to clear them, page by page, whenever they come again.
    """
    with contextlib.suppress(OSError, AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(M_ARENA_MAX, 1)
        if any(set_option(M_MMAP_THRESHOLD, size) for size in LARGEST):  # the first that it takes
            set_option(M_TRIM_THRESHOLD, NEVER)


def measured_peak_flops(dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    """FLOP/s of square matrix products of this dtype with the threads at hand: what MFU is a share of on a CPU."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
