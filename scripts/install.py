"""Runs pip and shows its progress in a line or two; the complete output goes to a file.

usage: install.py LOG PIP_ARGUMENTS...

Standard library only, since nothing else is installed yet. Exits with pip's exit code.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

TAIL = 15  # lines of the log that are shown after a failure
INTERVAL_S = 20.0  # between lines where there is no terminal
PHASES = (
    (re.compile(r"\s*Collecting (?P<package>[\w.-]+)"), "collecting"),
    (re.compile(r"\s*Downloading (?:\S*/)?(?P<package>[\w.]+)-\S+"), "downloading"),
    (re.compile(r"\s*Building wheels? for (?P<package>[\w.-]+)"), "building"),
    (re.compile(r"Installing collected packages: (?P<package>.+)"), "installing"),
)


class Progress:
    """What pip is doing, as one line that is redrawn on a terminal and repeated now and then elsewhere."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.is_terminal = sys.stderr.isatty()
        self.packages: set[str] = set()
        self.shown_at = float("-inf")
        self.phase = ""

    def read(self, line: str) -> None:
        """Take a line of pip's output."""
        for pattern, phase in PHASES:
            if match := pattern.match(line):
                self._show(phase, match["package"])
                return

    def _show(self, phase: str, package: str) -> None:
        if phase == "installing":
            package = f"{len(package.split(','))} packages (takes the longest)"
        else:
            self.packages.add(package.lower())
            package = f"{package} ({len(self.packages)} packages so far)"
        now = time.monotonic()
        is_new_phase, self.phase = phase != self.phase and phase == "installing", phase
        text = f"  {_minutes(now - self.started)}  {phase} {package}"
        if self.is_terminal:
            sys.stderr.write(f"\r\033[K{text[:100]}")
            sys.stderr.flush()
        elif is_new_phase or now - self.shown_at > INTERVAL_S:
            self.shown_at = now
            print(text, file=sys.stderr, flush=True)

    def end(self, succeeded: bool) -> None:
        """Replace the line by the outcome."""
        if self.is_terminal:
            sys.stderr.write("\r\033[K")
        if succeeded:
            print(f"  {_minutes(time.monotonic() - self.started)}  installed", file=sys.stderr, flush=True)


def main(log: Path, arguments: list[str]) -> int:
    """Run `python -m pip` with these arguments; its output is appended to `log`."""
    progress = Progress()
    command = [sys.executable, "-m", "pip", *arguments]
    with log.open("a", encoding="utf-8", errors="replace") as file:
        print("$", *command, file=file, flush=True)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
            for line in pip.stdout:
                file.write(line)
                file.flush()
                progress.read(line)
    progress.end(pip.returncode == 0)
    if pip.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        print("The installation failed. pip's last lines:", *(f"  {line}" for line in last), sep="\n", file=sys.stderr)
        print(f"Its complete output is in {log}", file=sys.stderr)
    return pip.returncode


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        print(__doc__.split("\n\n")[1], file=sys.stderr)
        sys.exit(2)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
