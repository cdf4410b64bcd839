"""scripts/chat.py and scripts/eval_llm.py: a conversation with a trained model, or its answers to a list of prompts.

Its command line is read with the standard library only, so that --help works before the installation.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sft_recipe.cli.flags import Parser
from sft_recipe.cli.sampling_flags import (
    add_model_flags,
    add_sampling_flags,
    add_thinking_flag,
    check_not_empty,
    find_device,
    given_sampling,
    thinking,
)
from sft_recipe.errors import ConfigError, DataError, notify, run_command, silence_libraries

if TYPE_CHECKING:
    from sft_recipe.chat.session import Session

USAGE = "scripts/chat.py MODEL [--prompts FILE] [--compare [BASE]] [FLAGS]"
DESCRIPTION = """\
Talks to a trained model in the terminal. A run folder means its best checkpoint, else its newest one; an
adapter is loaded over its base model. Through a pipe, stdin is one question: echo Hi | scripts/chat.py outputs"""


def main(args: list[str]) -> int:
    """Run a command line; returns the exit code: 0 done, 2 an error that the message explains, 130 after Ctrl-C."""
    return run_command(lambda: run(parse_arguments(args)))


def parse_arguments(args: list[str]) -> argparse.Namespace:
    """Return the parsed command line. Raises ConfigError if it is invalid; --help prints the help and exits."""
    parser = Parser(USAGE, DESCRIPTION)
    add_model_flags(parser)
    add_thinking_flag(parser)
    parser.add_argument("--prompts", metavar="FILE", help="answer a list: a prompt on each line, or a JSON list")
    parser.add_argument(
        "--compare",
        nargs="?",
        const="",
        metavar="BASE",
        help="show the answers of BASE as well (default: the model that it was trained from)",
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt; for --prompts and pipes")
    add_sampling_flags(parser)
    options = parser.parse_args(args)
    check_not_empty(options, "model", "prompts", "device")
    options.sampling = given_sampling(options)
    return options


def run(options: argparse.Namespace) -> int:
    """Talk, or answer the prompts, and return 0. Raises ModelError, DataError and ConfigError."""
    prompts = _read_prompts(options)
    silence_libraries(shows_progress=False)  # before the next imports
    from sft_recipe.chat.compare import load_models
    from sft_recipe.chat.session import Session

    device = find_device(options.device)
    models = load_models(options.model, options.compare, device, thinking(options), options.trust_remote_code)
    sampling = models[-1].sampling.updated(options.sampling)  # those of the trained model for both
    system = [{"role": "system", "content": options.system}] if options.system else []
    _answer(options, [Session(model, sampling, system) for model in models], prompts)
    return 0


def _read_prompts(options: argparse.Namespace) -> list[str] | None:
    """Return the prompts to answer, None for a conversation."""
    from sft_recipe.chat.prompt_file import read_prompts

    if options.prompts:
        return read_prompts(options.prompts)
    if sys.stdin is None or not sys.stdin.isatty():
        text = sys.stdin.read().strip() if sys.stdin else ""
        if not text:
            raise DataError("stdin is empty: write a question to it, or name a list with --prompts FILE")
        return [text]
    if options.json:
        raise ConfigError("--json is for lists: name one with --prompts FILE, or write a question to stdin")
    return None


def _answer(options: argparse.Namespace, sessions: Sequence[Session], prompts: list[str] | None) -> None:
    from rich.console import Console

    from sft_recipe.chat.display import Display
    from sft_recipe.chat.prompt_list import answer_prompts, answer_prompts_as_json
    from sft_recipe.chat.terminal import COMMANDS, Terminal

    display = Display(Console(highlight=False))
    is_piped = prompts is not None and not options.prompts
    words = {line.split()[0] for text in prompts or () for line in text.splitlines() if line.strip()}
    if is_piped and (commands := words.intersection(COMMANDS)):
        notify(f"{', '.join(sorted(commands))}: stdin is one question; commands are read from a terminal only")
    if prompts is None:
        import readline  # noqa: F401  # line editing and history for input()

        Terminal(sessions, display).run()
    elif options.json:
        answer_prompts_as_json(prompts, sessions, _write)
    else:
        answer_prompts(prompts, sessions, display, has_headings=not is_piped)


def _write(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without an error message
    sys.exit(main(sys.argv[1:]))
