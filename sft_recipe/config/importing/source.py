"""Reads a file with the configuration of another project, and says which project that is."""

import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sft_recipe.config.aliases import leaves
from sft_recipe.config.importing.axolotl import read_axolotl
from sft_recipe.config.importing.imported import Imported
from sft_recipe.config.importing.llamafactory import read_llamafactory
from sft_recipe.config.importing.parsing import parse_yaml
from sft_recipe.config.importing.trl import read_trl
from sft_recipe.config.importing.verl import read_verl
from sft_recipe.config.schema import Config
from sft_recipe.errors import ConfigError

Reader = Callable[[Mapping[str, Any], Path, int | None], Imported]
ASSIGNMENT = re.compile(r"\s*(?:export\s+)?(\w+)=(\"[^\"]*\"|'[^']*'|\S*)\s*")
VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)(?::-([^}]*))?\}")
TRL_COMMAND = re.compile(r"\btrl\s+sft\b|\bsft\w*\.py\b")
RECIPE = re.compile(r"^# @package _global_$", re.MULTILINE)
EXPECTED = "a YAML of LLaMA-Factory, axolotl, TRL or verl, or a shell script that starts SFT with TRL or verl"


def import_config(path: Path, gpus: int | None = None) -> tuple[str, Imported]:
    """Return the name of the project that a file is of, and its settings as overrides of ours for `gpus` GPUs,
    None: those that the file names, or one.

    Raises ConfigError for a file that cannot be read, that is none of a known project, or not supervised fine-tuning.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    problem = "unknown configuration"
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        tree, problem = None, f"not valid YAML ({error})"
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if isinstance(tree, dict) and set(tree) <= set(Config.model_fields) and RECIPE.search(text):
        raise ConfigError(f"{path} is a recipe of this project; use it as it is: ./train.sh --recipe {path}")
    name, reader, given = _of_yaml(tree) if isinstance(tree, dict) else _of_script(text)
    if not reader:
        raise ConfigError(f"{path}: {problem}; expected {EXPECTED}")
    imported = reader(given, path, gpus)
    imported.replace_optimizer()
    imported.note_missing()
    return name, imported


def _of_yaml(tree: dict[str, Any]) -> tuple[str, Reader | None, Mapping[str, Any]]:
    tree = {str(key): value for key, value in tree.items()}
    if "base_model" in tree:
        return "axolotl", read_axolotl, tree
    if (
        "model_name_or_path" in tree
        and "dataset_name" not in tree
        and {"stage", "finetuning_type", "dataset"} & set(tree)
    ):
        return "LLaMA-Factory", read_llamafactory, tree
    if "model_name_or_path" in tree:
        return "TRL", read_trl, tree
    if isinstance(tree.get("data"), dict) and isinstance(tree.get("trainer"), dict):
        return "verl", read_verl, leaves(tree)
    return "", None, {}


def _of_script(text: str) -> tuple[str, Reader | None, Mapping[str, Any]]:
    """The settings of the command in a script that starts SFT; variables that the script sets are filled in."""
    lines = text.replace("\\\n", " ").splitlines()
    variables: dict[str, str] = {}
    for line in lines:
        line = os.path.expandvars(VARIABLE.sub(lambda m: variables.get(m[1] or m[2], m[3] or m[0]), line))
        if match := ASSIGNMENT.fullmatch(line):
            variables[match[1]] = match[2].strip("\"'")
        is_verl = "verl.trainer" in line
        if line.lstrip().startswith("#") or not (is_verl or TRL_COMMAND.search(line)):
            continue
        try:
            words = shlex.split(line)
        except ValueError:
            continue
        if is_verl:
            pairs = [word.split("=", 1) for word in words if "=" in word]
            return "verl", read_verl, {name: _value(value) for name, value in pairs}
        return "TRL", read_trl, _flags(words)
    return "", None, {}


def _flags(words: list[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            given[name] = _value(value) if has_value else True
        elif name:
            before = given[name]
            given[name] = (
                _value(word) if before is True else [*(before if isinstance(before, list) else [before]), word]
            )
    return given


def _value(text: str) -> Any:
    """A value as YAML reads it, and numbers such as 1e-4, which YAML 1.1 takes for text."""
    try:
        return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text) else parse_yaml(text)
    except (ValueError, ConfigError):
        return text
