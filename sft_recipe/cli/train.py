"""train.sh: turns flags, environment variables and overrides into a configuration, and starts the ranks with it.

Until the configuration is composed it uses only the standard library, so that --help works before the installation.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_recipe import timing
from sft_recipe.cli.flags import CommandLine, parse, quote
from sft_recipe.errors import run_command, silence_libraries
from sft_recipe.language import set_language

if TYPE_CHECKING:
    from sft_recipe.config.schema import Config

CHECK = "--check"


def main(args: list[str]) -> int:
    """Run a command line; returns the exit code: 0 done, 2 an error that the message explains, 75 stopped and saved."""
    if CHECK in args:
        from sft_recipe.cli.check import main as check

        return check([word for word in args if word != CHECK])
    return run_command(lambda: _launch(parse_arguments(args)))


def parse_arguments(args: list[str]) -> CommandLine:
    """Return the parsed command line. Raises ConfigError if it is invalid; --help prints the help and exits."""
    return parse(args, os.environ)


def _launch(line: CommandLine) -> int:
    timing.mark("train.sh, its environment")
    silence_libraries()
    set_language(line.options.lang)
    with timing.paused_gc():
        from sft_recipe.config.compose import HOME, load_config, parse_config_args, recipe_folders, to_yaml
        from sft_recipe.config.recipes import describe_recipes
        from sft_recipe.config.secrets import without_secrets
        from sft_recipe.launch.local import start_ranks, torchrun_args

    where = parse_config_args(line.config_args)
    if line.options.recipes:
        print(describe_recipes(recipe_folders(where.get("config_dir", HOME))))
        return 0
    overrides = [*_launchers_overrides(line), *line.overrides]
    if line.options.multirun:
        return _sweep(line, overrides, where)
    config = load_config(overrides, **where)
    if line.options.launcher == "slurm":
        _check(config)
        return _submit(line, [config], line.overrides, [])
    if line.options.dry_run:
        _check(config)
        print(to_yaml(config))
        arguments = [*line.config_args, *without_secrets(line.overrides)]
        print(shlex.join(["torchrun", *torchrun_args(config.trainer, arguments)]))
        return 0
    if line.options.launcher == "ray":
        from sft_recipe.launch.ray import start_on_cluster

        return start_on_cluster(config)
    return start_ranks(config)


def _launchers_overrides(line: CommandLine) -> list[str]:
    """Return what a launcher sets until it knows better."""
    if line.options.launcher == "local":
        return []
    from sft_recipe.launch.ray import MASTER_UNKNOWN

    return [MASTER_UNKNOWN]


def _sweep(line: CommandLine, overrides: list[str], where: dict[str, Any]) -> int:
    """Run each combination of values; all configurations are checked before the first run starts."""
    from sft_recipe.config.compose import load_config
    from sft_recipe.launch import ray, sweep

    values, fixed = sweep.points(overrides), sweep.fixed(overrides)
    swept = [[f"{key}={value}" for key, value in point.items()] for point in values]
    folder = load_config([*fixed, *swept[0]], **where).trainer.run_folder
    runs = [[*point, _output_dir(folder / str(index))] for index, point in enumerate(swept)]
    configs = [load_config([*fixed, *run], **where) for run in runs]
    for config in configs:
        _check(config)
    if line.options.launcher == "slurm":
        code = _submit(line, configs, sweep.fixed(line.overrides), runs)
        if not line.options.dry_run:
            sweep.write_values(folder, values)
            print(f"scripts/report.py {shlex.quote(str(folder))} compares the runs, also before all have ended.")
        return code
    if line.options.dry_run:
        for index, point in enumerate(swept):
            print(f"{folder / str(index)}: {shlex.join(point)}")
        return 0
    is_local = line.options.launcher == "local"
    folder.mkdir(parents=True, exist_ok=True)
    module, parallel = ("local", 1) if is_local else ("ray", max(map(ray.places, configs)))
    return sweep.Sweep(folder, configs, values, f"sft_recipe.launch.{module}", parallel).run()


def _submit(line: CommandLine, configs: list[Config], overrides: list[str], runs: list[list[str]]) -> int:
    """Submit a job of SLURM, or an array with the overrides of the runs of a sweep; --dry_run prints the script."""
    from sft_recipe.config.secrets import without_secrets
    from sft_recipe.launch import slurm

    # All nodes need one folder, and so does a job that is queued again, also where it is named after the time.
    folder = [] if runs else [_output_dir(configs[0].trainer.run_folder)]
    decided = ("trainer.nnodes", "trainer.output_dir")
    given = [word for word in overrides if word.lstrip("+").partition("=")[0] not in decided]
    text = slurm.script(configs, without_secrets([*line.config_args, *given, *folder]), without_secrets(runs))
    if line.options.dry_run:
        print(text, end="")
    else:
        slurm.submit(text)
    return 0


def _output_dir(folder: Path) -> str:
    return f"trainer.output_dir={quote(str(folder))}"


def _check(config: Config) -> None:
    """Raise the errors that do not depend on this machine or on the state of the run folder."""
    from sft_recipe.config.preflight import check_config

    check_config(config, config.trainer.device)
    if config.trainer.resume_from not in (None, "auto"):
        from sft_recipe.checkpoint.resume import find_checkpoint

        find_checkpoint(config.trainer.resume_from, config.trainer.run_folder, is_restart=False, say=print)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
