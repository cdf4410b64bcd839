"""Starts the process of a rehearsal and sends it cases."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_recipe.engine.rehearsal import guard
from sft_recipe.errors import TrainingError

if TYPE_CHECKING:
    from sft_recipe.engine.rehearsal.step import Case, Rehearsed


class RehearsalFailed(TrainingError):
    """A step of a case raised an error; `traceback` is where."""

    def __init__(self, message: str, traceback: str = ""):
        super().__init__(message)
        self.traceback = traceback


class RehearsalSession:
    """Runs cases one after the other, as long as the context lasts. Entering raises PreflightError: see guard.py."""

    def __enter__(self) -> "RehearsalSession":
        self.folder = tempfile.TemporaryDirectory()
        library = guard.build(Path(self.folder.name))
        self.process: Any = subprocess.Popen(
            [sys.executable, "-m", __package__, str(library)],
            env={**os.environ, "VERL_PLATFORM": "nvidia", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()

    def run(self, case: "Case") -> "Rehearsed":
        """Rehearse a case. Raises RehearsalFailed where a step of it fails."""
        from sft_recipe.engine.rehearsal.step import Rehearsed

        self.process.stdin.write(json.dumps(asdict(case)) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "the process of the rehearsal has ended"}')
        if "error" in answer:
            raise RehearsalFailed(answer["error"], answer.get("traceback", ""))
        return Rehearsed(**answer)
