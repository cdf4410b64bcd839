"""Lets torch.cuda answer as on a machine with GPUs that this one lacks. For a process that does nothing else."""

import contextlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import fake_tensor

from sft_recipe.engine.rehearsal.memory import DeviceMemory


@dataclass(frozen=True)
class FakeGpu:
    """A GPU as torch.cuda describes it; `memory` in bytes."""

    name: str = "NVIDIA H100 80GB HBM3"
    memory: int = 80 * 2**30
    capability: tuple[int, int] = (9, 0)


class _Event:
    """An event, or a stream, of a device that computes in order."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def elapsed_time(self, _: Any) -> float:
        return 0.0

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: _Event()

    def __enter__(self) -> "_Event":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def install(gpu: FakeGpu, count: int, memory: DeviceMemory) -> None:
    """Replace the functions of torch.cuda, for good."""
    properties = types.SimpleNamespace(
        total_memory=gpu.memory, major=gpu.capability[0], minor=gpu.capability[1], name=gpu.name,
        multi_processor_count=108,
    )  # fmt: skip
    stream = _Event()
    answers = dict(
        is_available=True, device_count=count, current_device=0, set_device=None, get_device_properties=properties,
        get_device_capability=gpu.capability, get_device_name=gpu.name, synchronize=None, empty_cache=None,
        current_stream=stream, default_stream=stream, memory_reserved=0, max_memory_reserved=0,
        mem_get_info=(gpu.memory, gpu.memory), _lazy_init=None, is_initialized=True, reset_peak_memory_stats=None,
        manual_seed=None, manual_seed_all=None, is_current_stream_capturing=False,
    )  # fmt: skip
    cuda: Any = torch.cuda
    for name, value in answers.items():
        setattr(cuda, name, _answer(value))
    cuda._check_bf16_tensor_supported = lambda *_: True  # by emulation, as GPUs before Ampere answer
    cuda.memory_allocated = lambda *_: memory.now
    cuda.max_memory_allocated = lambda *_: memory.peak
    cuda.Stream = cuda.Event = _Event
    cuda.stream = lambda _: contextlib.nullcontext()
    torch.version.cuda = "13.0"
    accelerator: Any = torch.accelerator
    accelerator.current_stream = _answer(stream)
    torch.Tensor.record_stream = _answer(None)  # type: ignore[method-assign,assignment]
    torch.Tensor.data_ptr = _address  # type: ignore[method-assign,assignment]
    vars(fake_tensor)["init_gpu_context"] = _answer(None)
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda _: True)  # type: ignore[assignment]
    torch._C._ensureCUDADeviceGuardSet = _answer(None)


def _address(tensor: torch.Tensor) -> int:
    """Return a number that differs between storages; all fake tensors lie at 0, where FSDP1 takes them for one."""
    return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()


def _answer(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value
