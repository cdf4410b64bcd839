"""The flags of the programs that let a model answer: the model, its device, and the sampling options.

This module uses only the standard library, so that --help works before the first installation.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sft_recipe.chat.sampling import LIMITS, Sampling
from sft_recipe.cli.flags import Parser
from sft_recipe.errors import ConfigError, PreflightError
from sft_recipe.language import plural

if TYPE_CHECKING:
    import torch

HELP = {
    "temperature": "0: greedy decoding; higher: more varied answers",
    "top_p": "sample from the most likely tokens that have this probability together",
    "top_k": "sample from so many most likely tokens; 0: from all",
    "repetition_penalty": "above 1: tokens that occurred already are less likely",
    "max_new_tokens": f"the most tokens of an answer (default: {Sampling.max_new_tokens})",
    "seed": "the same answers in each run; without it they differ",
}


def add_model_flags(parser: Parser) -> None:
    """Add MODEL, --device and --trust_remote_code."""
    parser.add_argument("model", metavar="MODEL", help="run folder, checkpoint, model or adapter folder, hub id")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")


def add_thinking_flag(parser: Parser) -> None:
    """Add --enable_thinking."""
    parser.add_argument(
        "--enable_thinking", choices=["true", "false"], help="the template's switch (default: as in training)"
    )


def add_sampling_flags(parser: Parser) -> None:
    """Add the sampling flags; their defaults are those of the model's generation config."""
    group = parser.add_argument_group("sampling (default: the model's generation_config.json, else greedy)")
    for name, (_, _, is_whole) in LIMITS.items():
        group.add_argument(f"--{name}", type=int if is_whole else float, metavar="N", help=HELP[name])
    group.add_argument("--greedy", action="store_true", help="always the most likely token, as --temperature 0")
    group.add_argument("--stop", action="append", metavar="TEXT", help="text that ends an answer; may be repeated")


def given_sampling(options: argparse.Namespace) -> dict:
    """Return the sampling options that were given. Raises ConfigError for invalid ones, and for contradictions."""
    given = {name: getattr(options, name) for name in (*LIMITS, "stop") if getattr(options, name) is not None}
    if options.greedy:
        if clash := next((name for name in ("temperature", "top_p", "top_k") if name in given), None):
            raise ConfigError(f"--greedy and --{clash} contradict each other; leave one out")
        given["temperature"] = 0.0
    try:
        Sampling().updated(given)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from None
    return given


def thinking(options: argparse.Namespace) -> bool | None:
    """Return the value of --enable_thinking, None where it was not given."""
    return None if options.enable_thinking is None else options.enable_thinking == "true"


def find_device(name: str) -> torch.device:
    """Return the device that --device names. Raises PreflightError where this machine has no such device."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {name}; it must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = plural(torch.cuda.device_count(), "GPU")
        raise PreflightError(f"--device {name}: this machine has {count} that PyTorch can use")
    return device


def check_not_empty(options: argparse.Namespace, *names: str) -> None:
    """Raise ConfigError for a flag whose value is an empty text, as from an unset variable."""
    for name in names:
        if getattr(options, name) == "":
            raise ConfigError(f"{'MODEL' if name == 'model' else f'--{name}'} needs a value")
