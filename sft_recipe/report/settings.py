"""The settings of a run: what differs from the defaults or between runs, and the command that repeats the run."""

import re
import shlex
from functools import lru_cache
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

import sft_recipe.config.compose  # noqa: F401  # registers ${if_else:...}
from sft_recipe.config.schema import Config
from sft_recipe.report.run import Run
from sft_recipe.tracking.run_facts import read_facts

OF_THE_START = ("trainer.output_dir", "trainer.resume_from")  # keys of one start, which a repeated run sets anew
PLAIN_TEXT = re.compile(r"[A-Za-z_./~][\w./~@-]*")  # a text that Hydra reads as itself, unless it is a constant
PLAIN_OVERRIDE = re.compile(r"[a-z_.]+=[A-Za-z0-9_./~+-]+")  # needs no parser, which is slow
CONSTANTS = ("true", "false", "null", "nan", "inf")


def settings(run: Run) -> dict[str, Any]:
    """Return the configuration by complete keys such as optim.lr."""
    return flatten({key: value for key, value in run.config.items() if isinstance(value, dict)})


def differences(run: Run) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ from the defaults, each with its default; None for a key without one."""
    known = _defaults_of(run)
    return {key: (value, known.get(key)) for key, value in settings(run).items() if value != known.get(key)}


def compare_settings(runs: list[Run]) -> dict[str, list[Any]]:
    """Return the settings that are not equal in all runs, each with its values in the order of the runs.

    A key that a run does not have, since its version had none, counts as the default.
    """
    found = [_defaults_of(run) | settings(run) for run in runs]
    keys = dict.fromkeys(key for one in found for key in one)
    values = {key: [one.get(key) for one in found] for key in keys if key not in OF_THE_START}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def command(run: Run) -> str:
    """Return the command that repeats the run into a new folder.

    It sets what differs from the defaults. Where Hydra cannot read a value on the command line, such as a column's name
    with a colon, it names the config.yaml of the run.
    """
    folder = str(run.setting("trainer.output_dir", run.folder)).rstrip("/")
    target = f"trainer.output_dir={_hydra(folder + '-again')}"
    chosen = {key: value for key, (value, _) in differences(run).items() if key not in OF_THE_START}
    if read_facts(run.folder).get("model") == (fallback := run.setting("model.fallback")) is not None:
        chosen["model.path"] = fallback  # which was trained instead of the configured one
    overrides = [f"{key}={_hydra(value)}" for key, value in chosen.items()]
    if not all(_reads_as(text, value) for text, value in zip(overrides, chosen.values(), strict=True)):
        overrides = [f"--config-path={run.folder.resolve()}"]
    return shlex.join(["./train.sh", *overrides, target])


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree by complete keys; lists, and the dictionaries that are one value, stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        is_group = isinstance(value, dict) and (not prefix or name in _GROUPS)
        flat |= flatten(value, f"{name}.") if is_group else {name: value}
    return flat


def _nested_groups() -> set[str]:
    """The groups inside groups, by complete name: fsdp.mixed_precision, trainer.early_stopping."""
    groups = {name: cast(type[BaseModel], info.annotation) for name, info in Config.model_fields.items()}
    return {
        f"{name}.{key}"
        for name, group in groups.items()
        for key, info in group.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
    }


_GROUPS = _nested_groups()


def _defaults_of(run: Run) -> dict[str, Any]:
    return _defaults(bool(run.setting("lora.enabled")), bool(run.setting("lora.quantize")))


@lru_cache
def _defaults(uses_lora: bool, quantizes: bool) -> dict[str, Any]:
    """The defaults by complete keys; a learning rate, for one, has another default with LoRA."""
    tree: dict[str, Any] = {}
    computed: dict[str, Any] = {"lora": {"enabled": uses_lora, "quantize": quantizes}}
    for name, info in Config.model_fields.items():
        group = cast(type[BaseModel], info.annotation)
        tree[name] = group.model_validate({}).model_dump(mode="json")
        for key, field in group.model_fields.items():
            if isinstance(field.json_schema_extra, dict) and "yaml" in field.json_schema_extra:
                computed.setdefault(name, {}).setdefault(key, field.json_schema_extra["yaml"])
    resolved = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(computed), resolve=True))
    resolved["lora"] = {"enabled": quantizes}
    return flatten(tree) | flatten(resolved)


def _hydra(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_hydra(part)}' for key, part in value.items())}}}"
    if not isinstance(value, str):
        return str(value)
    if PLAIN_TEXT.fullmatch(value) and value.lower() not in CONSTANTS:
        return value
    return str(QuotedString(value, Quote.single).with_quotes())


def _reads_as(override: str, value: Any) -> bool:
    return PLAIN_OVERRIDE.fullmatch(override) is not None or bool(_parsed(override) == value)


@lru_cache  # a run that trains asks for the same ones again and again
def _parsed(override: str) -> Any:
    try:
        return _plain(OverridesParser.create().parse_override(override).value())
    except (HydraException, OmegaConfBaseException):
        return HydraException


def _plain(value: Any) -> Any:
    """A parsed value without the quotes that Hydra remembers."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(part) for key, part in value.items()}
    return value
