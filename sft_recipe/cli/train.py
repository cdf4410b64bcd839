"""train.sh: turns flags, environment variables and overrides into a configuration, and starts the ranks with it.

Until the configuration is composed it uses only the standard library, so that --help works before the installation.
"""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING

from sft_recipe import timing
from sft_recipe.cli.flags import CommandLine, parse
from sft_recipe.errors import run_command

if TYPE_CHECKING:
    from sft_recipe.config.schema import Config


def main(args: list[str]) -> int:
    """Run a command line; returns the exit code: 0 done, 2 an error that the message explains, 75 stopped and saved."""
    return run_command(lambda: _launch(parse_arguments(args)))


def parse_arguments(args: list[str]) -> CommandLine:
    """Return the parsed command line. Raises ConfigError if it is invalid; --help prints the help and exits."""
    return parse(args, os.environ)


def _launch(line: CommandLine) -> int:
    timing.mark("train.sh, its environment")
    with timing.paused_gc():
        from sft_recipe.config.compose import load_config, parse_config_args, to_yaml
        from sft_recipe.config.secrets import without_secrets
        from sft_recipe.launch.local import start_ranks, torchrun_args

    config = load_config(line.overrides, **parse_config_args(line.config_args))
    if line.options.dry_run:
        _check(config)
        print(to_yaml(config))
        arguments = [*line.config_args, *without_secrets(line.overrides)]
        print(shlex.join(["torchrun", *torchrun_args(config.trainer, arguments)]))
        return 0
    return start_ranks(config)


def _check(config: Config) -> None:
    """Raise the errors that do not depend on this machine or on the state of the run folder."""
    from sft_recipe.config.preflight import check_config

    check_config(config, config.trainer.device)
    if config.trainer.resume_from not in (None, "auto"):
        from sft_recipe.checkpoint.manager import find_checkpoint

        find_checkpoint(config.trainer.resume_from, config.trainer.run_folder, is_restart=False, say=print)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
