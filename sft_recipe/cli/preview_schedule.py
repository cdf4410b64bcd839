"""scripts/preview_schedule.py: draws the learning-rate schedule of a configuration; trains nothing, reads no data."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sft_recipe.cli.flags import FLAGS, CommandLine, Parser, parse
from sft_recipe.errors import PreflightError, run_command
from sft_recipe.files import user_path, write_text
from sft_recipe.language import plural

STEPS = 1000
WIDTH, HEIGHT = 72, 12  # of the drawing in a terminal, in characters
BLOCKS = " ▁▂▃▄▅▆▇█"
USAGE = "scripts/preview_schedule.py [--steps 1000] [--svg FILE] [TRAIN.SH'S FLAGS] [HYDRA OVERRIDES]"
DESCRIPTION = "Draws the learning rate of each step of a run."
EPILOG = "All flags, environment variables and overrides of ./train.sh are accepted and mean the same."


def main(args: list[str]) -> int:
    """Run a command line; returns the exit code: 0 done, 2 an error that the message explains."""
    return run_command(lambda: _run(parse_arguments(args)))


def parse_arguments(args: list[str]) -> CommandLine:
    """Return the parsed command line. Raises ConfigError if it is invalid; --help prints the help and exits."""
    parser = Parser(USAGE, DESCRIPTION, EPILOG)
    text = f"steps of the run (default: trainer.total_training_steps, or {STEPS:,})"
    parser.add_argument("--steps", type=_steps, metavar="NUMBER", help=text)
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also write the drawing as an SVG file")
    shown = [flag for flag in FLAGS if flag.key.startswith("optim.") or flag.key == "trainer.recipe"]
    return parse(args, os.environ, parser, shown)


def draw(rates: Sequence[float]) -> str:
    """Return a bar chart of the rates for a terminal, each column the mean of its steps."""
    width = min(WIDTH, len(rates))
    edges = [len(rates) * column // width for column in range(width + 1)]
    means = [sum(rates[begin:end]) / (end - begin) for begin, end in zip(edges, edges[1:], strict=False)]
    highest = max(means) or 1.0  # of a run that ends in the first step of its warmup
    eighths = [round(8 * HEIGHT * mean / highest) for mean in means]
    rows = []
    for row in reversed(range(HEIGHT)):
        bars = "".join(BLOCKS[max(0, min(8, eighth - 8 * row))] for eighth in eighths)
        label = f"{highest:.2e}" if row == HEIGHT - 1 else "0" if row == 0 else ""
        rows.append(f"{label:>9} |{bars}".rstrip())
    axis = f"1{len(rates):>{width - 1},}" if width > 1 else "1"
    return "\n".join([*rows, f"{'':9} +{'-' * width}", f"{'step':>9}  {axis}"])


def svg(rates: Sequence[float], title: str) -> str:
    """Return the rates as a line in an SVG image, with as few points as a chart of the report has."""
    from sft_recipe.report.charts import thin
    from sft_recipe.report.run import Series

    highest, last = max(rates) or 1.0, max(1, len(rates) - 1)
    curve = thin(Series(list(range(len(rates))), list(rates)))
    points = " ".join(
        f"{60 + 520 * step / last:.2f},{240 - 200 * rate / highest:.2f}"
        for step, rate in zip(curve.steps, curve.values, strict=True)
    )
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 280" font-family="sans-serif" font-size="12">
<rect width="600" height="280" fill="white"/>
<text x="60" y="24">{title}</text>
<path d="M60 40V240H580" fill="none" stroke="gray"/>
<polyline points="{points}" fill="none" stroke="steelblue" stroke-width="2"/>
<text x="54" y="44" text-anchor="end">{highest:.2g}</text><text x="54" y="244" text-anchor="end">0</text>
<text x="60" y="260">1</text><text x="580" y="260" text-anchor="end">{plural(len(rates), "step")}</text>
</svg>
"""


def _run(line: CommandLine) -> int:
    from sft_recipe.config.compose import load_config, parse_config_args
    from sft_recipe.config.optimizer import check_schedule
    from sft_recipe.engine.lr_schedule import schedule

    config = load_config(line.overrides, **parse_config_args(line.config_args))
    check_schedule(config)
    optim, total = config.optim, line.options.steps or config.trainer.total_training_steps or STEPS
    rates = [optim.lr * schedule(step, total, optim) for step in range(total)]
    peak = max(range(total), key=rates.__getitem__)
    title = f"{optim.lr_scheduler_type}, {plural(total, 'step')}"
    shown = ", ".join(f"{rates[step]:.3e} at step {step + 1:,}" for step in sorted({0, peak, total - 1}))
    print(f"{title}: {shown}\n")
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # for a terminal without block characters
    print(draw(rates))
    if line.options.svg:
        path = user_path(line.options.svg)
        try:
            write_text(path, svg(rates, title))
        except OSError as error:
            raise PreflightError(f"{path} cannot be written: {error.strerror}") from None
        print(f"\nimage: {path}")
    return 0


def _steps(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 10**7):
        raise argparse.ArgumentTypeError(f"{text} is not a number of steps, 1 to 10,000,000")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
