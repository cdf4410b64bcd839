"""scripts/check_sft_ready.py and train.sh --check: reports whether a run with these settings is ready.

Until the configuration is composed it uses only the standard library, so that --help works before the installation.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from sft_recipe.cli.flags import CommandLine, Parser, add_language, parse
from sft_recipe.cli.sizes import size
from sft_recipe.errors import ConfigError, RecipeError, run_command, silence_libraries
from sft_recipe.language import chosen_language, fill

if TYPE_CHECKING:
    from sft_recipe.readiness.check import Machine
    from sft_recipe.readiness.findings import Check

USAGE = "scripts/check_sft_ready.py [--json] [--measure] [--gpus N --gpu_memory 24GB] [TRAIN.SH'S FLAGS] [OVERRIDES]"
DESCRIPTION = """\
Checks the machine, the data, the model, the plan and the memory of a run, before it starts.
Exits with 2 if something would stop the run; warnings alone exit with 0."""
EPILOG = "All other flags, environment variables and overrides of ./train.sh are accepted and mean the same."
MARKS = {
    "en": {"ok": "ok      ", "warning": "warning ", "error": "ERROR   "},
    "zh": {"ok": "正常  ", "warning": "警告  ", "error": "错误  "},
}
INDENT = 8 * " "
COLORS = {"ok": "green", "warning": "yellow", "error": "red"}
SUMMARY = {
    "en": "{errors:# error}, {warnings:# warning}: {verdict}",
    "zh": "{errors} 个错误，{warnings} 个警告：{verdict}",
}
VERDICTS = {"en": ("ready", "not ready"), "zh": ("可以开始训练", "不能开始训练")}


def check_parser() -> Parser:
    """Return the parser of the flags of check_sft_ready.py; `parse` adds those of train.sh."""
    parser = Parser(USAGE, DESCRIPTION, EPILOG)
    parser.add_argument("--json", action="store_true", help="print one JSON object: ok, settings, checks")
    parser.add_argument("--measure", action="store_true", help="train a few real steps on this machine, and predict")
    parser.add_argument("--gpus", type=_positive, metavar="N", help="ask about another machine: its number of GPUs")
    parser.add_argument("--gpu_memory", type=size, metavar="24GB", help="and the memory of each")
    add_language(parser)
    return parser


def main(args: list[str]) -> int:
    """Run a command line; returns the exit code: 0 ready, 2 not ready, or an error that the message explains."""
    return run_command(lambda: _answer(args))


def parse_arguments(args: list[str]) -> CommandLine:
    """Return the parsed command line. Raises ConfigError if it is invalid; --help prints the help and exits."""
    return parse(args, os.environ, check_parser())


def _answer(args: list[str]) -> int:
    """Run the checks; with --json an error before them is the only one."""
    try:
        return _run(parse_arguments(args))
    except RecipeError as error:
        if "--json" not in args:
            raise
        check = {"name": "configuration", "status": "error", "message": str(error), "remedy": ""}
        print(json.dumps({"ok": False, "settings": {}, "checks": [check]}, ensure_ascii=False, indent=1))
        return error.exit_code


def _run(line: CommandLine) -> int:
    options = line.options
    language = chosen_language(options.lang)
    machine = _machine(options)
    if machine and options.measure:
        raise ConfigError("--measure trains on this machine, and --gpu_memory asks about another one: choose one")
    silence_libraries()
    from sft_recipe.config.compose import load_config, parse_config_args
    from sft_recipe.config.secrets import without_secrets
    from sft_recipe.readiness.check import check_readiness, effective_settings, for_machine

    config = load_config(line.overrides, **parse_config_args(line.config_args))
    settings = without_secrets(effective_settings(for_machine(config, machine) if machine else config))
    if not options.json:
        _print_settings(settings)
    checks = []
    for check in check_readiness(config, machine, options.measure):
        checks.append(check)
        if not options.json:
            _print_check(check, language)
    errors, warnings = (sum(check.status == status for check in checks) for status in ("error", "warning"))
    if options.json:
        found = [check.as_json(language) for check in checks]
        print(json.dumps({"ok": not errors, "settings": settings, "checks": found}, ensure_ascii=False, indent=1))
    else:
        verdict = VERDICTS[language][errors > 0]
        print(fill(SUMMARY[language], errors=errors, warnings=warnings, verdict=verdict))
    return RecipeError.exit_code if errors else 0


def _machine(options: argparse.Namespace) -> Machine | None:
    if options.gpus is None and options.gpu_memory is None:
        return None
    if options.gpu_memory is None:
        raise ConfigError("--gpus asks about another machine: also say how much memory each has (--gpu_memory 24GB)")
    from sft_recipe.readiness.check import Machine

    return Machine(options.gpus or 1, options.gpu_memory)


def _print_settings(settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        print(f"{key}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    print()


def _print_check(check: Check, language: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    mark, colon = MARKS[language][check.status], {"zh": "："}.get(language, ": ")
    message = check.message(language).replace("\n", f"\n{INDENT}")
    line = Text(f"{check.title(language)}{colon}{message}", style="default")
    console.print(Text(mark, style=COLORS[check.status]) + line, soft_wrap=True)
    if remedy := check.advice(language):
        console.print(Text(f"{INDENT}-> {remedy}"), soft_wrap=True)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a number of GPUs, 1 or more")
    return int(text)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without an error message
    sys.exit(main(sys.argv[1:]))
