"""benchmarks/RESULTS.md: each benchmark owns one section, between markers, and leaves the others alone."""

import os
import platform
from datetime import date
from pathlib import Path

import psutil
import torch

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"


def write_section(name: str, markdown: str, path: Path = RESULTS) -> None:
    """Replace section `name` by `markdown`, its heading included; a section that is not there yet is put last."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    text = path.read_text() if path.is_file() else "# Results\n\nEach section is written by the script that it names.\n"
    section = f"{begin}\n{markdown.strip()}\n{end}\n"
    if begin in text:
        before, _, rest = text.partition(begin)
        text = before + section + rest.partition(f"{end}\n")[2]
    else:
        text = f"{text.rstrip()}\n\n{section}"
    path.write_text(text)


def machine() -> str:
    """Where and with what something was measured, in a line: day, cores, memory, GPU, versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    memory = psutil.virtual_memory().total / 2**30
    cores = len(os.sched_getaffinity(0))
    return (
        f"{date.today()}, {_processor()}, {cores} cores, {memory:.0f} GiB, {gpu}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
