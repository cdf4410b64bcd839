"""Renews docs/run.svg: runs three steps of ./train.sh, and writes what it prints as a picture."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 130
COMMAND = "./train.sh trainer.total_training_steps=3 data.train_batch_size=2 data.max_length=256"


def record() -> str:
    """Run COMMAND in a new run folder; return what it prints. Raises CalledProcessError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        run_folder = f"{folder}/outputs"
        command = [*COMMAND.split(), f"trainer.output_dir={run_folder}"]
        environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "COLUMNS": str(COLUMNS)}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
    # The picture shows the default run folder; the spaces keep the border of the box straight.
    spaces = " " * (len(run_folder) - len("./outputs"))
    text = re.sub(rf"{re.escape(run_folder)}( +│)", rf"./outputs{spaces}\1", done.stdout)
    return text.replace(run_folder, "./outputs").rstrip()


def styled(text: str) -> Text:
    """Return the output in color: notices and boxes, labels, and the numbers of a step."""
    result = Text(text)
    result.highlight_regex(r"[╭╮╰╯│─]+", "bright_black")
    result.highlight_regex(r"(?<=─ )notice(?= ─)", "bold yellow")
    result.highlight_regex(r"(?<=─ )Supervised fine-tuning(?= ─)", "bold cyan")
    result.highlight_regex(r"(?m)(?<=^│ )[a-z]+(?=  )", "bold")
    result.highlight_regex(r"(?m)^step \d+/\d+", "bold cyan")
    result.highlight_regex(r"loss [\d.]+", "green")
    return result


def main() -> int:
    """Write docs/run.svg; return the exit code."""
    text = record()
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(f"[bold green]$[/] {COMMAND}", highlight=False)
        console.print(styled(text), soft_wrap=True)
    svg = console.export_svg(title="./train.sh")
    svg = re.sub(r"\n\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # the picture needs no network
    (ROOT / "docs/run.svg").write_text(svg, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
