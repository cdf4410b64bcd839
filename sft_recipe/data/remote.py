"""Stores data from elsewhere in the cache folder: data sets of the hub, and files that fsspec reads (s3, gs, https)."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path
from typing import Any

from sft_recipe.errors import DataError
from sft_recipe.files import atomic_write, digest

URL = re.compile(r"(?P<protocol>[a-z][a-z0-9+.]*)://.+", re.DOTALL)
STREAMED_ROWS = 1000  # written at a time


def download_files(url: str, cache_dir: Path) -> list[Path]:
    """Return local copies of the files at a URL, which may be a glob, in order; a file that has changed is read again.

    Raises DataError for a protocol without its package, and for what is missing or cannot be read.
    """
    import fsspec

    protocol = url.partition("://")[0]
    with _explained(url, f"check the address, or what fsspec needs to read {protocol}://"):
        file_system, path = fsspec.core.url_to_fs(url)
        paths = sorted(file_system.glob(path)) if re.search(r"[*\[]", path) else [path]
        versions = [sorted(map(str, file_system.info(path).items())) for path in paths]  # with size, time or ETag
    if not paths:
        raise DataError(f"No file matches {url}; check the pattern.")
    files = []
    for path, version in zip(paths, versions, strict=True):
        name = path.partition("?")[0].rstrip("/").rpartition("/")[2]
        key = digest(f"{protocol} {path} {version}".encode())

        def fetch(partial: Path, path: str = path) -> None:
            advice = "check the connection"
            with _explained(url, advice), file_system.open(path, "rb") as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 22)

        files.append(_stored(cache_dir / "remote" / key / name, url, fetch))
    return files


def download_data_set(name: str, config: str | None, split: str, cache_dir: Path) -> Path:
    """Return a data set of the hub as one Parquet file; one that does not fit the disk twice is streamed into it.

    Raises DataError for a data set that the hub does not give, and for a full disk.
    """
    from datasets import load_dataset

    names = (name, config) if config else (name,)
    whole = f"{name} ({f'config {config}, ' if config else ''}split {split})"
    advice = "check the name, or download it and name the files"
    try:
        rows = load_dataset(*names, split=split)
        version, write = rows._fingerprint, rows.to_parquet
    except OSError as error:
        if "disk space" not in str(error):
            raise _not_given(whole, error, advice) from error
        with _explained(whole, advice):
            rows = load_dataset(*names, split=split, streaming=True)
        version, write = _revision(name), lambda partial: _stream(rows, partial)
    except Exception as error:  # many types, of four packages: no network, no such name, no such split, gated
        raise _not_given(whole, error, advice) from error
    parts = [name.replace("/", "--"), *([config, split] if config else []), version]
    return _stored(cache_dir / "datasets" / f"{'-'.join(parts)}.parquet", name, write)


def _not_given(name: str, error: Exception, advice: str) -> DataError:
    return DataError(f"{name} is neither a file here nor a data set that the hub gives ({_reason(error)}); {advice}.")


def _revision(name: str) -> str:
    """The revision of a data set, which names its file where nothing else identifies the rows."""
    from huggingface_hub import dataset_info

    return str(dataset_info(name).sha)[:16]


def _stream(rows: Any, file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = rows.features.arrow_schema if rows.features else None
    writer = None
    for batch in rows.iter(batch_size=STREAMED_ROWS):
        table = pa.Table.from_pydict(batch, schema=schema)
        schema = table.schema
        writer = writer or pq.ParquetWriter(file, schema, compression="zstd")
        writer.write_table(table)
    if writer:
        writer.close()


def _stored(file: Path, name: str, write: Callable[[Path], Any]) -> Path:
    """The file, written if it is not there yet."""
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as partial:
                write(partial)
        except OSError as error:
            raise DataError(f"{name} cannot be stored in {file.parent}: {error.strerror or error}") from error
    return file


@contextmanager
def _explained(name: str, advice: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # many types, of many packages
        if isinstance(error, OSError) and error.errno == ENOSPC:
            raise  # the disk here is full
        raise DataError(f"{name} cannot be read ({_reason(error)}); {advice}.") from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
