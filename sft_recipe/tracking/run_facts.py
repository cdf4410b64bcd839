"""run.json: what is known of a run when its training starts, for its report.

Its end adds the peak of its memory, an early stop its reason.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft_recipe.files import write_text

FILE = "run.json"
STOPPED_EARLY = "stopped_early"
STRATEGY = "strategy"  # the one that runs, which may be another than the configured one
PEAK_MEMORY, PREDICTED_MEMORY = "peak_memory_gb", "predicted_memory_gb"


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write the facts into a run folder. A disk that is full does not end the run here: saving reports it."""
    with suppress(OSError):
        write_text(folder / FILE, json.dumps(facts, ensure_ascii=False, indent=1) + "\n")


def add_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Add facts to those of a run folder."""
    write_facts(folder, read_facts(folder) | facts)


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the facts of a run folder, an empty dictionary where there are none that can be read."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
