"""The console that people read, and notices on it."""

from rich.console import Console
from rich.panel import Panel
from rich.text import Text


def console() -> Console:
    """Return the console for standard output; without a terminal its lines are up to 200 columns wide."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=200)


def notice(text: str) -> None:
    """Print something that the user must not miss, in a frame."""
    console().print(Panel(Text(text), title="notice", title_align="left", border_style="yellow", expand=False))
