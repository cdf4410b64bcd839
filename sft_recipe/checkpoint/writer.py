"""Writes a rank's tensors as safetensors, straight from their memory, and digests them on their way to the disk."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from xxhash import xxh3_128

from sft_recipe.files import BLOCK, drop_pages

# The names that safetensors has for dtypes.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # in a file's metadata, as torch's reader expects it
FLUSHED = 1 << 26  # bytes after which the kernel is asked to start writing them to the disk


class ShardWriter(FileSystemWriter):
    """Writes what torch's HuggingFaceStorageReader reads: shards of tensors, each with its offset in the whole.

    torch's own writer builds each file in memory first, twice, while Python's global lock is held. `files` has the
    fingerprint of every file that this rank has written. They are not synced.
    """

    def __init__(self, folder: Path, numbers: dict[str, int]):
        """`numbers` maps each tensor to the number, from 1, of its file."""
        super().__init__(folder)
        self.folder = folder
        self.numbers = numbers
        self.files: dict[str, list] = {}

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the ranks, from 1."""
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans, 1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files. Raises OSError."""
        parts: dict[int, list[WriteItem]] = {}
        for item in plan.items:
            parts.setdefault(self.numbers[item.index.fqn], []).append(item)
        last = max(self.numbers.values(), default=1)
        for number, items in parts.items():
            name = f"shard-{plan.storage_data:05}-model-{number:05}-of-{last:05}.safetensors"
            tensors = {item.index.fqn: planner.resolve_data(item) for item in items}
            offsets = {item.index.fqn: {OFFSETS: _offsets(item)} for item in items}
            metadata = {SHARDING: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
            self.files[name] = write_safetensors(self.folder / name, tensors, metadata)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, 0, None) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing is left to write: each file describes itself."""


def write_safetensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> list:
    """Write tensors to a new file, and return its fingerprint. Raises OSError.

    The disk begins to write while more is written. The widest dtypes come first, so that all are aligned.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header_bytes = len(text).to_bytes(8, "little") + text
    digest, written, flushed = xxh3_128(), 0, 0
    with path.open("wb") as file:
        for block in _blocks(header_bytes, [tensors[name] for name in names]):
            file.write(block)
            digest.update(block)
            written += len(block)
            if written - flushed >= FLUSHED:  # starts writing these to the disk, and returns
                drop_pages(file.fileno(), flushed, written - flushed)
                flushed = written
    return [written, digest.hexdigest()]


def _blocks(header: bytes, tensors: list[torch.Tensor]) -> Iterator[memoryview]:
    """The bytes of a file; tensors of a GPU are copied to the host one by one."""
    yield memoryview(header)
    for tensor in tensors:
        view = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(view), BLOCK):
            yield view[begin : begin + BLOCK]


def _offsets(item: WriteItem) -> list[int]:
    """Where a part of a tensor begins in the complete tensor."""
    assert item.tensor_data is not None
    return list(item.tensor_data.chunk.offsets)
