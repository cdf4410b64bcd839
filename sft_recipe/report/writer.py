"""Writes the page of a run, and beside it loss.png."""

from pathlib import Path

from sft_recipe.files import write_text
from sft_recipe.report.image import write_image
from sft_recipe.report.page import loss_chart, run_page
from sft_recipe.report.run import Run

REPORT = "report.html"
IMAGE = "loss.png"


def write_report(run: Run, path: Path, language: str = "en") -> None:
    """Write the page of a run to `path`, and beside it loss.png where a loss is finite; both atomically.

    Raises OSError.
    """
    write_text(path, run_page(run, language))
    chart = loss_chart(run, str)
    if chart.drawable:
        write_image(chart, f"Loss of {run.folder.resolve().name}", path.with_name(IMAGE))
