"""What the user wrote in data.train_files -> sources: files, globs and data sets of the hub, each with its share."""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from sft_recipe.data.messages import data_error
from sft_recipe.data.readers import COMPRESSED, CONTAINERS, KNOWN, suffix_of
from sft_recipe.errors import DataError

SHARE = re.compile(r"(?P<name>.+?)(\*(?P<weight>\d+(\.\d*)?|\.\d+)|#(?P<count>\d+))")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:(?P<split>[\w.\[\]:%+-]+))?")


@dataclass(frozen=True)
class Source:
    """Files that count as one, and how many of their examples an epoch holds: all times `weight`, or `count`."""

    name: str
    files: tuple[Path, ...]
    weight: float = 1.0
    count: int | None = None

    def target_count(self, examples: int) -> int:
        """Examples that an epoch holds, at least one, where the files have this many."""
        return self.count if self.count is not None else max(1, round(self.weight * examples))


@dataclass(frozen=True)
class SourceCounts:
    """How many of a source's examples an epoch holds."""

    name: str
    examples: int
    target_count: int


def resolve_files(spec: str | Path | Sequence[str | Path], cache_dir: Path | None = None) -> list[Source]:
    """The sources that a path, a glob, a hub data set or a list of those names; what a glob matches comes sorted.

    `a.json*0.5` is half of a file's examples, `a.json*3` three copies, `b.jsonl#1000` a thousand of them, and
    `owner/name` or `owner/name:split` a data set of the hub, kept in `cache_dir`.

    Raises DataError for a file that is missing, empty, unreadable, a directory, of an unknown kind, or given
    twice, for a glob that matches nothing, for a share of nothing, and for a data set that cannot be had.
    """
    items = [spec] if isinstance(spec, str | Path) else spec
    sources = [_source(str(item), cache_dir) for item in items]
    if not sources:
        raise DataError("No data file is given; name a file, a glob or a list of those.")
    seen: set[Path] = set()
    for file in (file for source in sources for file in source.files):
        check_file(file)
        if file.resolve() in seen:
            raise data_error(str(file), "the file is given twice; name each data file once (file*2 trains it twice)")
        seen.add(file.resolve())
    return sources


def _source(item: str, cache_dir: Path | None) -> Source:
    share = None if os.path.exists(Path(item).expanduser()) else SHARE.fullmatch(item)
    name = share["name"] if share else item
    weight = float(share["weight"]) if share and share["weight"] else 1.0
    count = int(share["count"]) if share and share["count"] else None
    if not weight or count == 0:
        raise DataError(f"{item} asks for nothing of {name}; leave it out, or ask for more.")
    return Source(name, tuple(_expand(name, cache_dir)), weight, count)


def _expand(name: str, cache_dir: Path | None) -> list[Path]:
    path = Path(name).expanduser()
    if os.path.exists(path):
        return [path]
    if any(mark in name for mark in "*?["):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if found:
            return found
        if not HUB_NAME.fullmatch(name):
            raise DataError(f"No file matches {path.absolute()}; check the pattern.")
    hub_name = HUB_NAME.fullmatch(name)
    if hub_name and suffix_of(path) not in CONTAINERS and not path.parent.is_dir() and cache_dir:
        return [_download(name.partition(":")[0], hub_name["split"] or "train", cache_dir)]
    return [path]


def _download(name: str, split: str, cache_dir: Path) -> Path:
    """A data set of the hub as one Parquet file, found again by the fingerprint of what was loaded."""
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    except Exception as error:  # of a dozen kinds, of four packages: no network, no such name, no such split, gated
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{name} (split {split}) is neither a file here nor a data set that the hub gives ({reason}); "
            "check the name, or download it and name the files."
        ) from error
    folder = cache_dir / "datasets"
    file = folder / f"{name.replace('/', '--')}-{rows._fingerprint}.parquet"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        try:
            rows.to_parquet(partial)
            partial.replace(file)
        except OSError as error:
            raise DataError(f"{name} cannot be kept in {folder}: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)
    return file


def check_file(path: Path) -> None:
    """Raises DataError for a file that cannot be read as data."""
    if os.path.isdir(path):
        data = sorted(file.name for file in path.iterdir() if suffix_of(file) in CONTAINERS)[:5]
        inside = ", ".join(data) or "no data files"
        raise data_error(str(path), f"a directory (with {inside}); name a file, or a glob: {path / '*.json'}")
    if not os.path.exists(path):
        raise DataError(f"Data file not found: {path.absolute()}{_beside(path)}.")
    if suffix_of(path) == ".txt":
        problem = "a text per line says neither what was asked nor what is to be learnt"
        raise data_error(str(path), f"{problem}; write prompt and response as .jsonl")
    if suffix_of(path) not in CONTAINERS or (suffix_of(path) == ".parquet" and path.suffix.lower() in COMPRESSED):
        raise data_error(str(path), f"unknown kind of file; expected one of {KNOWN}")
    if not os.access(path, os.R_OK):
        raise data_error(str(path), "no permission to read this file; change its mode or its owner")
    if path.stat().st_size == 0:
        raise data_error(str(path), "the file is empty; give one with at least one record", "empty")


def _beside(path: Path) -> str:
    """What else the missing file could have been."""
    if not os.path.isdir(path.parent):
        return f" (there is no folder {path.parent.absolute()})"
    near = get_close_matches(path.name, [file.name for file in path.parent.iterdir()])
    return f"; near it: {', '.join(near)}" if near else "; check the path"
