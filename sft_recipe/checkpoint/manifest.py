"""The manifest of a checkpoint: a description of the checkpoint, and the size and checksum of every file in it."""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from xxhash import xxh3_128, xxh3_128_hexdigest

from sft_recipe import FORMAT_VERSION
from sft_recipe.errors import CheckpointError
from sft_recipe.files import MISSING, THREADS, drop_cached, retried, update_digest, write_text
from sft_recipe.language import plural

MANIFEST = "manifest.json"
BEST = "best"  # the link to the best evaluated checkpoint, beside the checkpoints

Files = Mapping[str, list | None]  # fingerprints by relative name; None where nobody has computed it yet


def list_files(folder: Path) -> list[str]:
    """Return every file below `folder` except the manifest, as relative names in a fixed order."""
    files = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MANIFEST)


def fingerprints(folder: Path, names: Iterable[str]) -> dict[str, list]:
    """Return {name: [bytes, XXH3-128 in hex]}; several files are read at a time. Raises OSError."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as threads:
        return dict(zip(names, threads.map(lambda name: _fingerprint(folder / name), names), strict=True))


def write_manifest(folder: Path, metadata: dict[str, Any], files: dict[str, list]) -> None:
    """Write the last file of a checkpoint, with a checksum of its content. Raises OSError."""
    content = {"format_version": FORMAT_VERSION} | metadata | {"files": files}
    write_text(folder / MANIFEST, json.dumps(content | {"checksum": fingerprint(content)}, indent=2))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return what `write_manifest` wrote; a manifest without `format_version` is one of version 1.

    Raises ValueError where there is none, or where it has changed since; CheckpointError for one that a newer version
    of this program wrote, or that cannot be read now.
    """
    try:
        content = json.loads(retried(lambda: _read_file(checkpoint / MANIFEST)))
        format_version = int(content.get("format_version", 1))
        checksum = content.pop("checksum")
    except (*MISSING, ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError):
        raise ValueError(f"it has no readable {MANIFEST}") from None
    except OSError as error:
        raise _unreadable(checkpoint, error) from None
    if format_version > FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint} was saved by a newer version of sft_recipe: its format_version is {format_version}, and "
            f"this one reads up to {FORMAT_VERSION}. Upgrade sft_recipe, or start a new run with --output_dir FOLDER."
        )
    if checksum != fingerprint(content):
        raise ValueError(f"{MANIFEST} has changed since it was written")
    return content


def _read_file(path: Path) -> bytes:
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("not a file")
    return path.read_bytes()


def verify(checkpoint: Path) -> str:
    """Read every file of a checkpoint. Returns what differs from its manifest, or an empty text where nothing does.

    A file that cannot be read is no difference. Raises CheckpointError for a checkpoint that a newer version of this
    program wrote, that cannot be read now, or that has tensors in it which it was not saved with.
    """
    try:
        files = read_manifest(checkpoint)["files"]
    except ValueError as error:
        return str(error)
    try:
        # torch reads whatever tensors are in the folder of the state, and takes either of two with the same name.
        for path in sorted(checkpoint.glob("state/*.safetensors")):
            if str(path.relative_to(checkpoint)) not in files:
                raise CheckpointError(
                    f"{path} is no file of this checkpoint; move it out of the folder and start again"
                )
        return compare(checkpoint, files)
    except MISSING as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except OSError as error:
        raise _unreadable(checkpoint, error) from None


def compare(checkpoint: Path, files: dict[str, list], from_disk: bool = False) -> str:
    """Read files of a checkpoint. Returns what differs from their fingerprints, or an empty text. Raises OSError.

    With `from_disk` they are not read from memory, where the system keeps what was written.
    """
    for name, (size, _) in files.items():  # first what shows without reading everything
        found = retried((checkpoint / name).stat).st_size
        if found != size:
            return f"{name} has {plural(found, 'byte')} instead of {size:,}"
        if from_disk:
            drop_cached(checkpoint / name)
    actual = fingerprints(checkpoint, files)
    return next((f"{name} does not have its checksum" for name in files if actual[name] != files[name]), "")


def fingerprint(content: dict[str, Any]) -> str:
    """Return the XXH3-128, in hex, of what JSON can hold; the order of keys does not matter."""
    return xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _fingerprint(path: Path) -> list:
    def read() -> list:
        digest = xxh3_128()
        size = update_digest(digest, path)
        return [size, digest.hexdigest()]

    return retried(read)


def _unreadable(checkpoint: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{error.filename or checkpoint} cannot be read: {error.strerror or error}. Nothing was changed; start again "
        f"when the file system answers, or move {checkpoint.name} away to continue from an earlier checkpoint."
    )
