"""scripts/evaluate.py: runs benchmarks of lm-evaluation-harness on a trained model.

Its command line is read with the standard library only, so that --help works before the installation.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_recipe.cli.flags import Parser
from sft_recipe.cli.sampling_flags import add_model_flags, check_not_empty, find_device
from sft_recipe.errors import (
    CheckpointError,
    ConfigError,
    PreflightError,
    notify,
    pip_install,
    run_command,
    silence_libraries,
)
from sft_recipe.files import user_path, write_text
from sft_recipe.report.benchmarks import FOLDER

if TYPE_CHECKING:
    from sft_recipe.chat.source import ModelSource
    from sft_recipe.evaluation.harness import TaskResult

USAGE = "scripts/evaluate.py MODEL --tasks NAME[,NAME...] [--limit N] [FLAGS]"
DESCRIPTION = """\
Runs benchmarks of lm-evaluation-harness (.venv/bin/python -m pip install -e '.[eval]') on a trained model, also while
its run goes on. A run folder means its best checkpoint, else its newest one; an adapter is loaded over its base
model. The results of a run's checkpoint are also written into the run folder: evaluations/step_N-TIME.json."""
PACKAGES = ("lm_eval", "torch", "transformers", "datasets", "peft")


def main(args: list[str]) -> int:
    """Run a command line; returns the exit code: 0 done, 2 an error that the message explains."""
    return run_command(lambda: run(parse_arguments(args)))


def parse_arguments(args: list[str]) -> argparse.Namespace:
    """Return the parsed command line. Raises ConfigError if it is invalid; --help prints the help and exits."""
    parser = Parser(USAGE, DESCRIPTION)
    add_model_flags(parser)
    parser.add_argument("--tasks", required=True, metavar="NAMES", help="tasks or groups, such as arc_easy,hellaswag")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N examples of each task (default: all)")
    parser.add_argument(
        "--num_fewshot", type=int, metavar="K", help="examples with answers before each question (default: the task's)"
    )
    parser.add_argument(
        "--apply_chat_template", action="store_true", help="put the questions into the model's chat template"
    )
    parser.add_argument("--include_path", metavar="DIR", help="folder with YAML files that define further tasks")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(args)
    check_not_empty(options, "model", "device", "tasks", "include_path")
    options.tasks = list(dict.fromkeys(name.strip() for name in options.tasks.split(",")))
    if not all(options.tasks):
        raise ConfigError(f"--tasks has an empty name: {','.join(options.tasks)!r}")
    for name, lowest in ("limit", 1), ("num_fewshot", 0):
        if (value := getattr(options, name)) is not None and value < lowest:
            raise ConfigError(f"--{name} is {value}; it must be a whole number from {lowest}")
    if options.include_path and not user_path(options.include_path).is_dir():
        raise ConfigError(f"--include_path: there is no folder {options.include_path}")
    return options


def run(options: argparse.Namespace) -> int:
    """Evaluate the model, and return 0. Raises RecipeError of several kinds."""
    silence_libraries(shows_progress=sys.stderr.isatty())
    from sft_recipe.chat.loading import load_module, load_settings
    from sft_recipe.chat.source import find_source
    from sft_recipe.config.preflight import is_installed

    device = find_device(options.device)
    source = find_source(options.model, options.trust_remote_code)
    if not is_installed("lm_eval"):
        raise PreflightError("lm-evaluation-harness is not installed: " + pip_install("-e '.[eval]'"))
    from sft_recipe.evaluation.harness import find_tasks, run_tasks

    folder = user_path(options.include_path) if options.include_path else None
    manager = find_tasks(options.tasks, folder)
    config, tokenizer = load_settings(source, options.trust_remote_code)
    if options.apply_chat_template and not tokenizer.chat_template:
        raise ConfigError(f"--apply_chat_template: {options.model} has no chat template; leave the flag out")
    module = load_module(source, config, device, options.trust_remote_code)
    asked = options.limit, options.num_fewshot, options.apply_chat_template
    results = run_tasks(manager, options.tasks, module, tokenizer, *asked)
    report = _report(options, source, str(module.dtype).removeprefix("torch."), str(device), results)
    if options.json:
        print(json.dumps(report))
    else:
        _print(results)
    if source.checkpoint:  # after the results have been shown, which took long
        path = _write(report, source.checkpoint)
        notify(f"the results are in {path}")
    return 0


def _report(
    options: argparse.Namespace, source: ModelSource, dtype: str, device: str, results: dict[str, TaskResult]
) -> dict[str, Any]:
    from sft_recipe import __version__
    from sft_recipe.evaluation.harness import BATCH_SIZE

    tasks = {
        name: asdict(result) | {"scores": {metric: _score(*pair) for metric, pair in result.scores.items()}}
        for name, result in results.items()
    }
    names = "tasks", "limit", "num_fewshot", "apply_chat_template", "include_path"
    given = {name: getattr(options, name) for name in names}
    return {
        "model": options.model,
        "checkpoint": source.checkpoint.name if source.checkpoint else None,
        "adapter": str(source.adapter) if source.adapter else None,
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "tasks": tasks,
        "settings": given | {"batch_size": BATCH_SIZE, "device": device, "dtype": dtype},
        "versions": {"sft_recipe": __version__, "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
    }


def _score(value: float, stderr: float | None) -> dict[str, float | None]:
    return {"value": value if math.isfinite(value) else None, "stderr": stderr}  # JSON has no NaN


def _write(report: dict[str, Any], checkpoint: Path) -> Path:
    moment = report["time"].partition("+")[0].replace(":", "").replace("-", "")
    path = checkpoint.parent.parent / FOLDER / f"{checkpoint.name}-{moment}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}; the results are above") from None
    return path


def _print(results: dict[str, TaskResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "version", "few-shot", "examples", "metric", "value", "standard error")
    for name, result in results.items():
        for metric, (value, stderr) in result.scores.items():
            facts = (result.version, result.num_fewshot, result.samples)
            shown = ["" if fact is None else str(fact) for fact in facts]
            table.add_row(name, *shown, metric, f"{value:.4f}", "" if stderr is None else f"{stderr:.4f}")
    out = Console(highlight=False)
    (out if out.is_terminal else Console(highlight=False, width=120)).print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
