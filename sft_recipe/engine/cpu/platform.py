"""verl's platform plug-in for CPUs: gloo for collectives, the memory of the process, nothing to synchronize.

Must be registered before verl's engine is imported, and must not import the engine itself.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import get_platform
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

from sft_recipe.distributed.host_memory import available_memory, total_memory
from sft_recipe.distributed.processes import available_cores
from sft_recipe.engine.cpu.process_memory import peak_memory, process_memory

# For how many shapes oneDNN, and PyTorch before it, cache the code of matrix products. The default is 1,024; since each
# entry is allocated in the middle of a step, many small entries fragment the heap.
KERNEL_CACHE_SIZES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "32"}

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # from malloc.h
# Bytes of a tensor, and the most that glibc accepted before 2.35. Few tensors are larger, such as logits and gathered
# embeddings; on the heap they would need a gap of their size, which the small ones fill, so that it would grow.
LARGEST_ON_HEAP = 2**25
NEVER = -1


class _CpuModule(ModuleType):
    """`torch.cpu` with the functions of `torch.cuda` that verl calls."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return available_cores()

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def set_device(self, *_: Any) -> None:
        pass

    def get_device_name(self, *_: Any) -> str:
        return "cpu"

    def synchronize(self, *_: Any) -> None:
        pass

    def empty_cache(self) -> None:
        trim_heap()

    def reset_peak_memory_stats(self, *_: Any) -> None:
        pass

    def memory_allocated(self, *_: Any) -> int:
        return process_memory()

    memory_reserved = memory_allocated

    def max_memory_allocated(self, *_: Any) -> int:
        return peak_memory().read()

    max_memory_reserved = max_memory_allocated

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        return available_memory(), total_memory()


class PlatformCPU(PlatformBase):
    """verl's description of a machine without an accelerator."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _CpuModule("torch.cpu")

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")

    def device_count(self) -> int:
        return available_cores()

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
        trim_heap()

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "SFT_CPU_RANKS"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

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

    Raises RuntimeError where verl has chosen another platform already.
    """
    os.environ["VERL_PLATFORM"] = "cpu"
    PlatformRegistry.register(platform="cpu")(PlatformCPU)
    if get_platform().device_name != "cpu":
        raise RuntimeError(f"verl chose the platform {get_platform().device_name} before the CPU was registered")
    for name, count in KERNEL_CACHE_SIZES.items():
        os.environ.setdefault(name, count)
    tune_malloc()
    peak_memory()


def tune_malloc() -> None:
    """Let all threads share one heap that returns no memory to the system by itself, where the C library is glibc.

    By default each thread has a heap, and memory that one thread has freed is not available to others. Also, most
    tensors are returned to the system when freed, which has to clear their pages when they are allocated again.
    """
    with contextlib.suppress(OSError, AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(M_ARENA_MAX, 1)
        set_option(M_MMAP_THRESHOLD, LARGEST_ON_HEAP)
        set_option(M_TRIM_THRESHOLD, NEVER)


def trim_heap() -> None:
    """Return the free pages of the heap to the system, where the C library is glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
