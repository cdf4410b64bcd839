"""Resolves data.train_files and data.val_files: files, globs, URLs and data sets of the hub, each with its share."""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_recipe.data.messages import data_error
from sft_recipe.data.readers import READERS, check_file, suffix_of
from sft_recipe.data.remote import URL, download_data_set, download_files
from sft_recipe.errors import DataError
from sft_recipe.files import user_path

SHARE = re.compile(r"(?P<name>.+?)(\*(?P<weight>\d+(\.\d*)?|\.\d+)|#(?P<count>\d+))")
# Of one source in an epoch, unless its files have more. Each takes about 20 bytes and half a microsecond to plan, in
# each process: at this number 2 GB and a minute, which is more than all published data for fine-tuning needs.
MAX_EXAMPLES = 100_000_000
HUB_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.+-]+)(?=:\w))?(:(?P<split>\w[\w.\[\]:%+-]*))?"
)


@dataclass(frozen=True)
class Source:
    """A Source is a group of files; an epoch has `weight` times their examples, or `count` of them."""

    name: str
    files: tuple[Path, ...]
    weight: float = 1.0
    count: int | None = None

    def target_count(self, examples: int) -> int:
        """Return how many examples an epoch has, at least one, if the files have `examples` of them.

        Raises DataError for so many that an epoch cannot be planned.
        """
        count = self.count if self.count is not None else max(1, round(self.weight * examples))
        if count > max(examples, MAX_EXAMPLES):
            raise _too_many(self.name)
        return count


@dataclass(frozen=True)
class SourceCounts:
    """SourceCounts has the number of examples in a source, and how many of them an epoch has."""

    name: str
    examples: int
    target_count: int


def resolve_files(spec: str | Path | Sequence[str | Path], cache_dir: Path | None = None) -> list[Source]:
    """Return the sources for a path, a glob, a URL, a hub data set or a list of those; files of a glob are sorted.

    `a.json*0.5` is half of a file's examples, `a.json*3` three copies, `b.jsonl#1000` a thousand of them. What is
    elsewhere is stored in `cache_dir`: `s3://bucket/a.jsonl`, and data sets of the hub, `owner/name`,
    `owner/name:split` or `owner/name:config:split`.

    Raises DataError for a file that check_file refuses or that is given twice, for a glob that matches nothing, for
    a share of 0 or of too many examples, and for a data set that cannot be downloaded.
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
    share = None if os.path.exists(user_path(item)) else SHARE.fullmatch(item)
    name = share["name"] if share else item
    weight = float(share["weight"]) if share and share["weight"] else 1.0
    count = float(share["count"]) if share and share["count"] else None  # int refuses thousands of digits
    other = re.fullmatch(r"(.+)[*#]([^*#/]*)", name)
    if other and os.path.isfile(user_path(other[1])) and not glob.glob(str(user_path(name))):
        raise DataError(f"{item}: {other[2]!r} is no share of {other[1]}; one is written *0.5, *2 or #1000.")
    if not weight or count == 0:
        raise DataError(f"{item} asks for no examples of {name}; remove it, or give a share greater than 0.")
    if max(weight, count or 0) > MAX_EXAMPLES:  # files have at least one example
        raise _too_many(name)
    return Source(name, tuple(_expand(name, cache_dir)), weight, None if count is None else int(count))


def _too_many(name: str) -> DataError:
    return DataError(
        f"{name}: its share asks for more than {MAX_EXAMPLES:,} examples per epoch, which cannot be planned; give a "
        "smaller share, and more epochs (trainer.total_epochs)."
    )


def _expand(name: str, cache_dir: Path | None) -> list[Path]:
    if URL.fullmatch(name) and cache_dir:
        return download_files(name, cache_dir)
    path = user_path(name)
    if os.path.exists(path):
        return [path]
    if any(mark in name for mark in "*?["):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if files:
            return files
        if not HUB_NAME.fullmatch(name):
            raise DataError(f"No file matches {path.absolute()}; check the pattern.")
    hub_name = HUB_NAME.fullmatch(name)
    if hub_name and suffix_of(path) not in READERS and not path.parent.is_dir() and cache_dir:
        return [download_data_set(hub_name["name"], hub_name["config"], hub_name["split"] or "train", cache_dir)]
    return [path]
