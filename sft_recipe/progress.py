"""One kind of progress bar, for work whose length may not be known beforehand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    description: str, unit: str = "", total: int | None = None, show: bool = True
) -> Iterator[Callable[[int], None]]:
    """Shows a bar on a terminal's standard error; gives a function to call with the number of units done since.

    `unit` is a plural, such as "records"; without one there is no count. Without a terminal, or with `show` False,
    nothing is shown.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    done = [TextColumn("{task.completed:,} " + unit)] if unit else []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), *done, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
