"""Counts what the operations of a step do on the device: bytes that exist, kernels, calls that wait for the device."""

import traceback
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

BLOCK = 512  # bytes; PyTorch's allocator rounds up to a multiple
# Operations whose results have a size that only the device knows, or that the host reads.
WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten._unique2")
OWN_FILES = ("/engine/rehearsal/", "/torch/")


class DeviceMemory(TorchDispatchMode):
    """Inside, counts the bytes of all storages on "cuda" (`now`, `peak`), and the calls of each operation (`calls`).

    `waits` has the calls for which the host waits, with file and function; `largest` the largest tensor made on the
    device, in elements. A number that a step reads from the device is 1, or True.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.calls: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._sizes: dict[int, int] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "DeviceMemory":
        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            if storage._cdata in self._sizes:
                self._set(storage._cdata, size)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.calls[name] += 1
        if _waits(name, args, kwargs or {}):
            self.waits[f"{name} at {_caller()}"] += 1
        if name.startswith("aten._local_scalar_dense"):
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if name.startswith("aten.equal"):
            return True
        if name.startswith("aten._pin_memory"):
            return args[0]
        if name.startswith("aten.is_pinned"):
            return True
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        local = getattr(tensor, "_local_tensor", tensor)  # a DTensor's storage has the size of all shards together
        if local.device.type != "cuda":
            return
        self.largest = max(self.largest, local.numel())
        try:
            storage = local.untyped_storage()
        except NotImplementedError:  # a nested tensor has none
            return
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._free, key)
            self._set(key, storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        size = -(-size // BLOCK) * BLOCK
        self.now += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self._set(key, 0)
        del self._sizes[key]


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    if name.startswith(WAITING):
        return args[0].device.type == "cuda"
    if name.startswith("aten.index.Tensor"):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    if name.startswith("aten.repeat_interleave.Tensor"):
        return args[0].device.type == "cuda" and kwargs.get("output_size") is None
    if name == "aten._to_copy.default":
        target = kwargs.get("device")
        moves = target is not None and torch.device(target).type != args[0].device.type
        return moves and not kwargs.get("non_blocking", False)
    if name == "aten.copy_.default":
        is_async = kwargs.get("non_blocking", len(args) > 2 and args[2])
        return args[0].device.type != args[1].device.type and not is_async
    return False


def _caller() -> str:
    frames = [frame for frame in traceback.extract_stack() if not any(part in frame.filename for part in OWN_FILES)]
    return f"{Path(frames[-1].filename).name}, {frames[-1].name}" if frames else "?"
