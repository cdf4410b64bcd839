"""A checkpoint's manifest: what the checkpoint is, and size and checksum of every file in it."""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from xxhash import xxh3_128, xxh3_128_hexdigest

MANIFEST = "manifest.json"
THREADS = 8  # more than one disk or network mount keeps busy; hashing itself is faster than reading
CHUNK = 1 << 22  # bytes


def list_files(folder: Path) -> list[str]:
    """Every file below `folder` but the manifest, as relative names in a fixed order."""
    files = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MANIFEST)


def fingerprints(folder: Path, names: Iterable[str]) -> dict[str, list]:
    """{name: [bytes, XXH3-128 in hex]}, several files at a time. Raises OSError."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as threads:
        return dict(zip(names, threads.map(lambda name: _fingerprint(folder / name), names), strict=True))


def write_manifest(folder: Path, metadata: dict[str, Any], files: dict[str, list]) -> None:
    """The last file of a checkpoint; it guards itself with a checksum too. Raises OSError."""
    content = metadata | {"files": files}
    with (folder / MANIFEST).open("w") as file:
        file.write(json.dumps(content | {"checksum": fingerprint(content)}, indent=2))
        file.flush()
        os.fsync(file.fileno())


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint was saved with. Raises ValueError where there is none, or not as it was written."""
    try:
        content = json.loads((checkpoint / MANIFEST).read_bytes())
        if content.pop("checksum") == fingerprint(content):
            return content
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"it has no readable {MANIFEST}") from None
    raise ValueError(f"{MANIFEST} is not as it was written")


def verify(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files, compared with its manifest; empty where nothing is."""
    try:
        files = read_manifest(checkpoint)["files"]
    except ValueError as error:
        return str(error)
    for name, (size, _) in files.items():  # what shows without reading everything comes first
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    try:
        there = fingerprints(checkpoint, files)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return next((f"{name} does not have its checksum" for name in files if there[name] != files[name]), "")


def _fingerprint(path: Path) -> list:
    digest, size = xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return [size, digest.hexdigest()]


def fingerprint(content: dict[str, Any]) -> str:
    """Of what JSON can hold, whatever the order of its keys."""
    return xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
