"""Renews docs/run.svg: runs three steps of ./train.sh in a terminal, and writes what it shows as a picture."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
COLUMNS, LINES = 112, 60
# In the picture the run folder is called what it is called by default.
COMMAND = "./train.sh trainer.total_training_steps=3 data.max_length=256"


def record(command: list[str], environment: dict[str, str]) -> str:
    """Run a command in a terminal of COLUMNS x LINES; return all that it wrote. Raises CalledProcessError."""
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=inside, stdout=inside, stderr=inside, env={**os.environ, **environment}
    )
    os.close(inside)
    written = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the end, on Linux
            break
        if not part:
            break
        written += part
    if code := process.wait():
        raise subprocess.CalledProcessError(code, command, written.decode(errors="replace"))
    return written.decode(errors="replace")


def final_screen(written: str) -> str:
    """Return the lines that remain after progress bars were redrawn and removed; colors stay."""
    lines, row = [""], 0
    for part in re.split(r"(\r\n|\n|\r|\x1b\[[0-9;?]*[A-Za-ln-z])", written):
        if part in ("\n", "\r\n"):
            row += 1
            if row == len(lines):
                lines.append("")
        elif up := re.fullmatch(r"\x1b\[(\d*)A", part):
            row = max(0, row - int(up[1] or 1))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\r":
            overwritten = "".join(re.findall(r"\x1b\[[0-9;]*m", lines[row]))
            lines[row] = lines[row] if row == len(lines) - 1 else overwritten
        elif not part.startswith("\x1b[") or part.endswith("m"):
            lines[row] += part
    return "\n".join(lines).rstrip()


def main() -> int:
    """Write docs/run.svg; return the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        output_dir = f"{folder}/outputs"
        command = [*COMMAND.split(), f"trainer.output_dir={output_dir}"]
        environment = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "VIRTUAL_ENV": sys.prefix}
        text = final_screen(record(command, environment))
        # Of the same length in a box, so that its border stays straight.
        text = text.replace(output_dir.ljust(len(output_dir)), "./outputs".ljust(len(output_dir)))
        text = re.sub(r"\./outputs( +)/", r"./outputs/", text)
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(f"[bold green]$[/] {COMMAND}", highlight=False)
        console.print(Text.from_ansi(text), highlight=False, soft_wrap=True)
    svg = console.export_svg(title="./train.sh")
    svg = re.sub(r"\n\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # the picture needs no network
    (ROOT / "docs/run.svg").write_text(svg, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
