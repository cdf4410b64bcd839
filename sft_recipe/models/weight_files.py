"""Checks a folder's weight files by their headers, before anything is built: all there, complete, and real."""

import json
import math
import struct
from pathlib import Path
from typing import Any

from sft_recipe.errors import ModelError
from sft_recipe.language import plural

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
LFS_POINTER = b"version https://git-lfs"
WITHOUT_SCALE = ("I8", "U8", "I16", "I32", "I64", "F8_E4M3", "F8_E5M2")  # dtypes that need factors beside the weights
LARGEST_HEADER = 100 * 2**20  # bytes, the limit of the safetensors format


def check_weight_files(folder: Path) -> None:
    """Raise ModelError where the folder's weights are missing, pickled, truncated, or pointers of Git LFS."""
    for path in weight_files(folder):
        if not path.is_file():
            raise ModelError(f"{folder} lacks {path.name}, a part of its weights: get the complete model")
        _check_file(path)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of the folder's weights, by its index. Raises ModelError where there are none."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise ModelError(f"{index} cannot be read: {error}") from None
        return [folder / name for name in sorted(names)]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise ModelError(f"{folder} has neither {WEIGHTS} nor {INDEX}; {', '.join(others[:3])} is not read")
    pickled = sorted(folder.glob("*.bin"))
    hint = f"; only pickled weights, which are loaded where they are named: --model {pickled[0]}" if pickled else ""
    raise ModelError(f"{folder} has no weights: there is no .safetensors file{hint}")


def count_weights(path: Path) -> int:
    """Return how many numbers a safetensors file, which check_weight_files accepts, holds."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def refuse_lfs_pointer(path: Path, begin: bytes) -> None:
    """Raise ModelError for a file that begins, with at least 8 bytes, as a pointer of Git LFS."""
    if begin and begin[: len(LFS_POINTER)] == LFS_POINTER[: len(begin)]:
        raise ModelError(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull` in that folder")


def _check_file(path: Path) -> None:
    """Compare a safetensors file's size with the one that its header states."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(8)
        refuse_lfs_pointer(path, begin)
        length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else LARGEST_HEADER + 1
        try:
            header: Any = json.loads(file.read(length)) if length <= LARGEST_HEADER else None
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, KeyError, TypeError):
            raise ModelError(f"{path} is no safetensors file, or its beginning is damaged") from None
    narrow = [name for name, entry in header.items() if name.endswith("weight") and entry["dtype"] in WITHOUT_SCALE]
    if narrow:
        raise ModelError(
            f"{path}: {narrow[0]} has the dtype {header[narrow[0]]['dtype']}; such weights are quantized, and nothing "
            "says how: name the model that they were made from"
        )
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        problem = f"{path} has {plural(size, 'byte')} instead of {expected:,}"
        raise ModelError(f"{problem}: the download or copy is incomplete")
