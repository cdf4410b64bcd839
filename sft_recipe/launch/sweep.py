"""A sweep: one run for each combination of values, in the folders 0, 1, ... of the output folder, and sweep.json."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_recipe.config.override_text import quote_texts
from sft_recipe.distributed.signals import EXIT_PREEMPTED
from sft_recipe.errors import CheckpointError, ConfigError, PreflightError
from sft_recipe.files import write_text

if TYPE_CHECKING:
    from sft_recipe.config.schema import Config

FILE, REPORT = "sweep.json", "report.html"
RESULTS = ("train/loss", "val/loss", "eval/bleu4")  # their last values are in sweep.json


def points(overrides: list[str]) -> list[dict[str, str]]:
    """Return the swept values of each run: Hydra's lists (`a,b`), `choice` and `range`, the last key varies fastest.

    Raises ConfigError where nothing is swept, or a sweep has no list of values.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    axes: dict[str, list[str]] = {}
    for text in overrides:
        try:
            item = OverridesParser.create().parse_override(quote_texts(text))
            if item.is_sweep_override():
                axes[item.get_key_element()] = list(item.sweep_string_iterator())
        except (HydraException, ValueError, TypeError, AttributeError):
            raise ConfigError(f"cannot read the sweep {text!r}; write the values as optim.lr=1e-5,2e-5") from None
    if not axes:
        raise ConfigError("--multirun needs a key with several values, such as optim.lr=1e-5,2e-5")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def fixed(overrides: list[str]) -> list[str]:
    """Return the overrides that have one value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return [
        text for text in overrides if not OverridesParser.create().parse_override(quote_texts(text)).is_sweep_override()
    ]


def write_values(folder: Path, values: list[dict[str, str]]) -> None:
    """Write sweep.json for runs that others start: the folder and the swept values of each. Raises PreflightError."""
    runs = [{"folder": str(index), "values": point} for index, point in enumerate(values)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_runs(folder, runs)
    except OSError as error:
        raise PreflightError(f"{folder / FILE} cannot be written: {error.strerror or error}") from None


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of the runs of the sweep in `folder`; none where it has no sweep.json. Raises CheckpointError.

    A run that has not trained a step is left out.
    """
    from sft_recipe.report.run import read_run

    path = folder / FILE
    if not path.is_file():
        return []
    try:
        found = [folder / str(run["folder"]) for run in json.loads(path.read_text(encoding="utf-8"))["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is not the file of a sweep; name its runs instead") from None
    runs = []
    for run in found:
        with suppress(CheckpointError):
            runs.append(read_run(run).folder)
    if not runs:
        raise CheckpointError(f"{folder}: no run of this sweep has trained a step yet; try again when one has")
    return runs


def _write_runs(folder: Path, runs: list[dict[str, Any]]) -> None:
    write_text(folder / FILE, json.dumps({"runs": runs}, indent=2) + "\n")


class Sweep:
    """The runs of a sweep, up to `parallel` at a time, each started as a module of Python that reads its configuration.

    `configs` are their configurations, whose output folders are `folder`/0, 1, ...; `values` what is swept in each.
    """

    def __init__(self, folder: Path, configs: list[Config], values: list[dict[str, str]], module: str, parallel: int):
        self.folder, self.configs, self.values = folder, configs, values
        self.module, self.parallel = module, parallel
        self.codes: dict[int, int] = {}
        self.running: dict[int, subprocess.Popen[str]] = {}
        self.is_stopped = False
        self.lock = threading.Lock()

    def run(self) -> int:
        """Run all; returns 0 if all runs did, else the first other exit code. A stop ends all, and starts no more."""
        before = {number: signal.signal(number, self._forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            waiting = list(range(len(self.configs)))
            while self.running or (waiting and not self.is_stopped):
                while waiting and len(self.running) < self.parallel and not self.is_stopped:
                    self._start(waiting.pop(0))
                time.sleep(0.2)
                for index, process in list(self.running.items()):
                    if process.poll() is not None:
                        del self.running[index]
                        self.codes[index] = process.returncode if process.returncode >= 0 else 128 - process.returncode
                        self._write()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self._compare()
        if self.is_stopped:
            return EXIT_PREEMPTED
        return next((code for code in self.codes.values() if code), 0)

    def _start(self, index: int) -> None:
        from sft_recipe.config.compose import to_json

        values = " ".join(f"{key}={value}" for key, value in self.values[index].items())
        print(f"run {index} of {len(self.configs)} ({values}) in {self.folder / str(index)}", flush=True)
        process = subprocess.Popen(
            [sys.executable, "-m", self.module, "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C reaches it once, from here
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert process.stdin
        process.stdin.write(to_json(self.configs[index]))
        process.stdin.close()
        self.running[index] = process
        threading.Thread(target=self._print, args=(index, process), daemon=True).start()

    def _print(self, index: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            with self.lock:
                print(f"[{index}] {line}", end="", flush=True)

    def _forward(self, number: int, _frame: object) -> None:
        self.is_stopped = True
        for process in self.running.values():
            process.send_signal(number)

    def _write(self) -> None:
        """Write sweep.json: folder, swept values, exit code and last results of each run that has ended."""
        runs = [
            {
                "folder": str(index),
                "values": self.values[index],
                "exit_code": code,
                **_results(self.folder / str(index)),
            }
            for index, code in sorted(self.codes.items())
        ]
        _write_runs(self.folder, runs)

    def _compare(self) -> None:
        """Write report.html, a comparison of the runs that have trained a step."""
        from sft_recipe.language import chosen_language
        from sft_recipe.report.compare import comparison_page
        from sft_recipe.report.run import read_run

        runs = []
        for index in sorted(self.codes):
            with suppress(CheckpointError):  # it ended before its first step
                runs.append(read_run(self.folder / str(index)))
        if len(runs) > 1:
            write_text(self.folder / REPORT, comparison_page(runs, chosen_language()))
            print(f"The comparison of the runs is in {self.folder / REPORT}.", flush=True)


def _results(run: Path) -> dict[str, Any]:
    from sft_recipe.report.run import read_run

    try:
        rows = read_run(run).rows
    except CheckpointError:  # it has ended before its first step
        return {}
    return {key: row[key] for row in rows for key in RESULTS if key in row}
