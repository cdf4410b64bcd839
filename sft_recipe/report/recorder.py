"""The report of a run while it trains: findings.json and report.html in its folder, and new findings on the console."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_recipe.errors import first_line
from sft_recipe.files import write_text
from sft_recipe.language import chosen_language
from sft_recipe.report.findings import find_problems
from sft_recipe.report.run import read_run
from sft_recipe.report.words import describe
from sft_recipe.report.writer import REPORT, write_report
from sft_recipe.tracking.run_facts import STOPPED_EARLY, add_facts

MOST_TIME = 0.02  # fraction of a run's time that its reports may take; seconds, where there are 100,000 steps
FILE = "findings.json"  # a list of what `describe` returns; empty where all is well


class RunReporter:
    """Keeps findings.json, report.html and loss.png up to date, and prints each finding once.

    A finding that comes again, or that was found before the run was resumed, is not printed again. Where a report
    fails, it says so once and the run goes on.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], is_resumed: bool, enabled: bool):
        """Findings of an earlier run in the folder do not count unless this one resumes it.

        Where it is not enabled, every method does nothing. Raises ConfigError for an unknown language.
        """
        self.folder = folder
        self.say = say
        self.enabled = enabled
        self.language = chosen_language()
        self.printed = set(_recorded(folder / FILE)) if is_resumed else set()
        self.has_failed = False
        self.next_time = 0.0

    def update(self, is_last: bool = False) -> None:
        """Read the run so far, write its findings and its report, and print the findings that were never printed.

        Nothing is done where that would take too much of the run's time, unless this is the last time.
        """
        started = time.monotonic()
        if self.enabled and (is_last or started >= self.next_time):
            self._write()
            ended = time.monotonic()
            self.next_time = ended + (ended - started) / MOST_TIME

    def conclude(self, stopped_early: str | None) -> None:
        """Write the last report and say where it is; `stopped_early` is the reason where the run did."""
        if not self.enabled:
            return
        if stopped_early:
            add_facts(self.folder, {STOPPED_EARLY: stopped_early})
        if self._write():
            self.say(f"The report is in {self.folder / REPORT}")

    def _write(self) -> bool:
        """Returns whether the report was written."""
        try:
            run = read_run(self.folder)
            found = [describe(finding, self.language) for finding in find_problems(run)]
            write_text(self.folder / FILE, json.dumps(found, ensure_ascii=False, indent=2) + "\n")
            self._print(found)
            write_report(run, self.folder / REPORT, self.language)
        except Exception as error:
            if not self.has_failed:
                reason = first_line(error)
                self.say(f"WARNING: the report of {self.folder} cannot be written: {reason}. Training goes on.")
            self.has_failed = True
            return False
        return True

    def _print(self, found: list[dict[str, Any]]) -> None:
        for finding in found:
            if finding["rule"] not in self.printed:
                self.printed.add(finding["rule"])
                self.say(f"FINDING: {finding['text']}")


def _recorded(path: Path) -> list[str]:
    """The rules of an earlier findings.json, none where it cannot be read."""
    try:
        return [finding["rule"] for finding in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return []
