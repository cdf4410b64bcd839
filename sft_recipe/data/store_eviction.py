"""Limits the disk space of token stores: those that have not been used for longest are removed first."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from sft_recipe.data.token_store import REPORT
from sft_recipe.display import byte_size
from sft_recipe.errors import notify
from sft_recipe.language import plural

DISK_SHARE = 0.2  # of the disk, for all token stores in a cache folder together
RECENT_S = 3600.0  # a store that was opened so recently may be about to be opened by other ranks


def mark_used(store: Path) -> None:
    """Note that a store has been opened now; in a cache that is read only nothing is noted."""
    with suppress(OSError):
        os.utime(store / REPORT)


def evict_stores(folder: Path) -> list[str]:
    """Remove stores in a cache folder, least recently used first, until they take at most DISK_SHARE of the disk.

    A store that was used in the last hour stays. Open stores remain usable, since they are mapped into memory. Returns
    the names of the removed stores.
    """
    stores = []
    for report in folder.glob(f"[!.]*/{REPORT}"):
        with suppress(OSError):
            size = sum(file.stat().st_size for file in report.parent.iterdir())
            stores.append((report.stat().st_mtime, size, report.parent))
    excess = sum(size for _, size, _ in stores) - DISK_SHARE * shutil.disk_usage(folder).total
    removed, freed = [], 0
    for used, size, store in sorted(stores):
        if freed >= excess or time.time() - used < RECENT_S:
            break
        with suppress(OSError):  # another process was faster
            away = store.rename(store.with_name(f".{store.name}.evicted"))
            shutil.rmtree(away, ignore_errors=True)
            removed.append(store.name)
            freed += size
    if removed:
        notify(f"removed {plural(len(removed), 'token store')} of {folder}, unused for longest ({byte_size(freed)})")
    return removed
