"""Reads a model's weights one at a time, and writes them as safetensors shards: memory holds one shard."""

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sft_recipe.models.weight_files import INDEX, WEIGHTS, weight_files

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Entry(NamedTuple):
    """An Entry describes a weight that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights(Protocol):
    """Weights are the weights of a model under the names of its files; `read` loads one of them."""

    entries: dict[str, Entry]

    def read(self, name: str) -> torch.Tensor:
        """Return a weight, in host memory."""


class StoredWeights:
    """StoredWeights are those of a model folder, mapped into memory rather than loaded."""

    def __init__(self, folder: Path):
        """Read the headers of the files. Raises ModelError where the folder has no weights."""
        self.files, self.entries = {}, {}
        for path in weight_files(folder):
            file = safe_open(path, "pt")
            for name in file.keys():  # noqa: SIM118  # not a dictionary
                part = file.get_slice(name)
                self.files[name] = file
                self.entries[name] = Entry(tuple(part.get_shape()), _dtype(part.get_dtype()))

    def read(self, name: str) -> torch.Tensor:
        """Return a weight."""
        return self.files[name].get_tensor(name)


def _dtype(name: str) -> torch.dtype:
    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return known.get(name, torch.int64)


def plan_shards(entries: dict[str, Entry], dtype: torch.dtype, shard_size: int) -> list[list[str]]:
    """Return the names of each shard; a shard has at most `shard_size` bytes unless it is one larger weight."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in entries.items():
        size = entry_bytes(entry, dtype)
        if shards[-1] and filled + size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def entry_bytes(entry: Entry, dtype: torch.dtype) -> int:
    """Return the bytes of a weight that is stored in `dtype`; integers keep theirs."""
    return prod(entry.shape) * (dtype if entry.dtype.is_floating_point else entry.dtype).itemsize


def write_weights(
    weights: Weights, folder: Path, dtype: torch.dtype, shard_size: int, advance: Callable[[int], None]
) -> None:
    """Write model.safetensors, or several files and their index, with floating-point weights rounded to `dtype`.

    `advance` is called with the number of weights done since. Raises OSError.
    """
    shards = plan_shards(weights.entries, dtype, shard_size)
    stem = WEIGHTS.removesuffix(".safetensors")
    files = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        shard = {}
        for name in names:
            value = weights.read(name)
            shard[name] = (value.to(dtype) if value.is_floating_point() else value).contiguous()
            files[name] = file
            advance(1)
        save_file(shard, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(entry_bytes(entry, dtype) for entry in weights.entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
