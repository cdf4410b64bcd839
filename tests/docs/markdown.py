"""Reads the Markdown of the documentation: code blocks with the note above them, tables, links."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.support.runs import ROOT

PAGES = ["README.md", "README.zh.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
NOT_RUN = re.compile(r"^<!-- not run: .+ -->$", re.M)


@dataclass(frozen=True)
class Block:
    """A code block. `reason` says why its commands cannot be run here, if they cannot."""

    language: str
    code: str
    reason: str | None

    @property
    def commands(self) -> list[str]:
        """The command lines, without comments."""
        lines = [shlex.split(line, comments=True) for line in self.code.splitlines()]
        return [shlex.join(words) for words in lines if words]


def text_of(page: str) -> str:
    """Return the text of a page, named relative to the repository."""
    return (ROOT / page).read_text(encoding="utf-8")


def prose_of(page: str) -> str:
    """Return the text of a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)


def blocks(page: str) -> list[Block]:
    """Return the code blocks of a page, in order."""
    return [Block(m["language"], m["code"], m["reason"]) for m in BLOCK.finditer(text_of(page))]


def tables(page: str) -> list[list[list[str]]]:
    """Return the tables of a page, each as its rows of cells, without the header."""
    found = re.findall(r"(?:^\|.*\|\n)+", prose_of(page), re.M)
    return [[_cells(row) for row in table.splitlines()[2:]] for table in found]


def code_spans(cell: str) -> list[str]:
    """Return the texts in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def local_links(page: str) -> list[Path]:
    """Return the files that a page links to."""
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text_of(page))
    return [(ROOT / page).parent / target for target in targets if "://" not in target]


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]
