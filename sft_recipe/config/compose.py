"""Composes config.yaml, conf/ and overrides through Hydra into one typed configuration.

Later overrides win, whether they choose a file of a group or set a value.
"""

import glob
import json
import os
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

from sft_recipe import FORMAT_VERSION
from sft_recipe.config.aliases import leaves, merge_older_names, notify_renamed, rename_key, rename_override
from sft_recipe.config.hydra_errors import explain_composition, explain_value
from sft_recipe.config.optim import OptimConfig
from sft_recipe.config.override_text import quote_texts
from sft_recipe.config.recipes import recipe_values
from sft_recipe.config.references import escape_references, map_texts
from sft_recipe.config.schema import Config
from sft_recipe.config.secrets import without_secrets
from sft_recipe.config.validation import all_keys, build_config, missing_groups, nearest, not_groups, text_keys
from sft_recipe.config.yaml_file import read_yaml
from sft_recipe.errors import ConfigError, notify
from sft_recipe.files import user_path

HOME = Path(__file__).resolve().parents[2]
WARMUP_RATIO = "optim.lr_warmup_steps_ratio"
RESOLVED = "--resolved-config="
CHANGES = "changes"  # of the user, in the resolved file beside the groups
GROUPS = ("model", "data", "optim", "fsdp", "lora", "eval")
RECIPE = "trainer.recipe"  # recipe=NAME, as for a group, means the same


def _if_else(*parts: Any) -> Any:
    if len(parts) != 3:
        raise ValueError("it is written ${if_else:CONDITION,VALUE,OTHERWISE}")
    condition, value, otherwise = parts
    return value if str(condition).lower() in ("true", "1", "yes", "on", "y", "t") else otherwise


def _either(*parts: Any) -> Any:
    notify_renamed("${either:...}", "${if_else:...}")
    return _if_else(*parts)


# In conf/: ${if_else:${lora.enabled},a,b} is a if LoRA is enabled, else b; `either` is the older name.
OmegaConf.register_new_resolver("if_else", _if_else, replace=True)
OmegaConf.register_new_resolver("either", _either, replace=True)


def load_config(overrides: list[str], config_dir: Path = HOME, config_name: str = "config") -> Config:
    """Compose the configuration and validate it.

    `overrides` are Hydra's: `optim.lr=1e-5`, `lora=r16`; they are applied from left to right. A group choice
    overwrites earlier values of the keys in its file, those of config.yaml included. A recipe overwrites config.yaml,
    and all overrides overwrite the recipe.

    Raises ConfigError for an unknown file, recipe, group or key, a value of the wrong type, or a sweep.
    """
    config_dir = Path(os.path.realpath(user_path(config_dir)))
    root = config_dir / f"{config_name.removesuffix('.yaml')}.yaml"
    if not root.is_file():
        raise ConfigError(f"there is no {root}; --config-path names the folder of config.yaml, --config-name the file")
    config_dir = root.parent
    all_parsed = _parse(overrides)
    parsed = [item for item in all_parsed if not _is_recipe(item)]
    choices = [item for item in parsed if _is_choice(item)]
    written = read_yaml(root)
    if wrong := not_groups(written):
        raise ConfigError(f"{root} cannot be used: {wrong}")
    tree = _compose(root, written, choices, config_dir)
    _check_format_version(tree.pop("format_version", FORMAT_VERSION), root)
    try:
        merge_older_names(tree, written)
        recipe = _recipe(all_parsed, tree, written)
        laid_over = recipe_values(recipe, recipe_folders(config_dir)) if recipe else {}
        if recipe != OmegaConf.select(tree, RECIPE):
            laid_over[RECIPE] = recipe
        for key, value in laid_over.items():
            OmegaConf.update(tree, key, value, merge=True, force_add=True)
        for item in parsed:
            if _is_choice(item):
                _choose(tree, item, config_dir)
            else:
                _assign(tree, item)
        if _model_was_named(parsed, leaves(written) | laid_over, written) and isinstance(tree.get("model"), DictConfig):
            tree.model.fallback = None
        if wrong := not_groups(OmegaConf.to_container(tree, resolve=False)) or missing_groups(tree):
            raise ConfigError(wrong)
        _add_defaults(tree)
        resolved = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_value(error)) from None
    assert isinstance(resolved, dict)
    config = build_config(_resolve_data_paths({str(key): value for key, value in resolved.items()}, config_dir))
    if any(item.key_or_group == WARMUP_RATIO for item in parsed):
        _notify_unused_warmup(config.optim)
    return config.record_changes(without_secrets([item.input_line or "" for item in parsed])) if recipe else config


def _notify_unused_warmup(optim: OptimConfig) -> None:
    """Say that a ratio which the user set has no effect: a recipe or config.yaml may give the steps."""
    if optim.lr_warmup_steps > 0:
        notify(
            f"{WARMUP_RATIO} has no effect beside optim.lr_warmup_steps={optim.lr_warmup_steps}; "
            "optim.lr_warmup_steps=-1 lets it count"
        )
    elif optim.lr_scheduler_type == "onecycle":
        notify(f"{WARMUP_RATIO} has no effect on onecycle, whose rising part is optim.pct_start={optim.pct_start:g}")


def recipe_folders(config_dir: Path) -> list[Path]:
    """Return where recipes are: beside config.yaml, then those that come with the program."""
    return list(dict.fromkeys([user_path(config_dir) / "conf/recipe", HOME / "conf/recipe"]))


def to_json(config: Config) -> str:
    """Return a composed configuration as JSON for another process; it may contain secrets."""
    return json.dumps(config.model_dump(mode="json") | {CHANGES: config.changes})


def from_json(text: str) -> Config:
    """Return the configuration that `to_json` wrote."""
    tree = json.loads(text)
    changes = tree.pop(CHANGES)
    return Config.model_validate(tree).record_changes(changes)


def load_for_rank(args: list[str]) -> Config:
    """Load the configuration of a rank from its arguments: the launcher's resolved file, or Hydra's arguments.

    The arguments are `--resolved-config=FILE`, or `[--config-path=DIR] [--config-name=NAME] [OVERRIDE ...]`.
    """
    if len(args) == 1 and args[0].startswith(RESOLVED):
        return from_json(Path(args[0].removeprefix(RESOLVED)).read_text())
    config_args = [text for text in args if text.startswith("-")]
    return load_config([text for text in args if text not in config_args], **parse_config_args(config_args))


def _check_format_version(version: Any, path: Path) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ConfigError(f"{path} has format_version {version!r}; it is a whole number from 1")
    if version > FORMAT_VERSION:
        raise ConfigError(
            f"{path} has format_version {version}, and this version of sft_recipe reads up to {FORMAT_VERSION}: "
            "upgrade sft_recipe"
        )


def parse_config_args(args: list[str]) -> dict[str, Any]:
    """Return `--config-path=DIR --config-name=NAME`, Hydra's options, as arguments of load_config."""
    parsed: dict[str, Any] = {}
    for text in args:
        name, _, value = text.partition("=")
        if name in ("--config-path", "-cp"):
            parsed["config_dir"] = Path(value)
        elif name in ("--config-name", "-cn"):
            parsed["config_name"] = value
        else:
            raise ConfigError(
                f"unknown argument {text}; the program accepts --config-path, --config-name and Hydra overrides"
            )
    return parsed


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as text that can be used as config.yaml again, in the same environment."""
    plain = map_texts(escape_references, config.model_dump(mode="json"))
    plain["trainer"]["recipe"] = None  # its values are here already, and would replace what was changed
    content = {"format_version": FORMAT_VERSION} | without_secrets(plain)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _parse(overrides: list[str]) -> list[Override]:
    parser = OverridesParser.create()
    result = []
    for text in overrides:
        text = rename_override(text)
        try:
            item = parser.parse_override(quote_texts(text))
        except HydraException:
            example = "overrides look like optim.lr=1e-5, lora=r16 or 'eval.prompts=[\"Why?\"]', texts in quotes"
            raise ConfigError(f"cannot read the override {text!r}; {example}") from None
        if item.is_delete() or item.is_sweep_override():
            what = "deleting a key" if item.is_delete() else "a sweep over several values"
            raise ConfigError(f"{text}: {what} is not supported; give each key one value")
        result.append(item)
    return result


def _is_choice(item: Override) -> bool:
    return item.key_or_group in GROUPS and isinstance(item.value(), str)


def _is_recipe(item: Override) -> bool:
    return item.key_or_group in ("recipe", RECIPE)


def _recipe(parsed: list[Override], tree: DictConfig, written: dict[str, Any]) -> str | None:
    """Return the recipe that was chosen last: by overrides, else by config.yaml, as a key or in its defaults list."""
    chosen = [_listed(written).get("recipe"), OmegaConf.select(tree, RECIPE)]
    chosen = [name for name in chosen if name is not None] + [item.value() for item in parsed if _is_recipe(item)]
    name = chosen[-1] if chosen else None
    if name is not None and (not isinstance(name, str) or not name):
        raise ConfigError(f"recipe={name}: it must be one name, or the path of one .yaml file; --recipes lists them")
    return name


def _choice_file(item: Override, config_dir: Path) -> Path:
    folders = [config_dir / "conf" / item.key_or_group, HOME / "conf" / item.key_or_group]
    for folder in folders:
        if (folder / f"{item.value()}.yaml").is_file():
            return folder / f"{item.value()}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    hint = nearest(str(item.value()), known)
    raise ConfigError(f"{item.key_or_group}={item.value()}: the choices are {', '.join(known)}.{hint}")


def _compose(root: Path, written: dict[str, Any], choices: list[Override], config_dir: Path) -> DictConfig:
    for item in choices:
        _choice_file(item, config_dir)
    folders = [folder for folder in dict.fromkeys([config_dir / "conf", HOME / "conf"]) if folder.is_dir()]
    searchpath = ",".join(QuotedString(f"file://{folder}", Quote.single).with_quotes() for folder in folders)
    # Hydra replaces only groups of the defaults list; a resolved config.yaml has none, and _choose is enough there.
    chosen = {item.key_or_group: item.value() for item in choices if item.key_or_group in _listed(written)}
    texts = [f"{group}={choice}" for group, choice in chosen.items()]
    texts += ["~recipe"] if "recipe" in _listed(written) else []  # laid over config.yaml later
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir), version_base=None):
            tree = compose(root.stem, overrides=[f"hydra.searchpath=[{searchpath}]", *texts])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{root} cannot be used: {explain_composition(error, root.stem, GROUPS)}") from None
    OmegaConf.set_struct(tree, False)
    return tree


def _listed(written: dict[str, Any]) -> dict[str, Any]:
    """Return the groups of the defaults list, each with its choice."""
    entries = written.get("defaults")
    pairs = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return {group: choice for entry in pairs for group, choice in entry.items()}


def _choose(tree: DictConfig, item: Override, config_dir: Path) -> None:
    group = item.key_or_group
    values = read_yaml(_choice_file(item, config_dir))
    values.pop("defaults", None)
    OmegaConf.update(tree, group, {rename_key(group, key): value for key, value in values.items()}, merge=True)


def _assign(tree: DictConfig, item: Override) -> None:
    key, known = item.key_or_group, all_keys()
    if not any(name == key or name.startswith(key + ".") or key.startswith(name + ".") for name in known):
        raise ConfigError(f"unknown key {key}.{nearest(key, known)}")
    value = item.value()
    if isinstance(value, int | float) and key in text_keys() and item.input_line:
        value = item.input_line.partition("=")[2].strip()  # a folder 2024_01_02 must not become the number 20240102
    OmegaConf.update(tree, key, value, merge=True, force_add=True)


def _add_defaults(tree: DictConfig) -> None:
    """Add the keys that no file sets, with their defaults, so that ${...} may refer to them."""
    for group, info in Config.model_fields.items():
        if not OmegaConf.is_interpolation(tree, group):
            defaults = cast(type[BaseModel], info.annotation).model_validate({}).model_dump(mode="json")
            present: Any = OmegaConf.to_container(tree.get(group) or OmegaConf.create(), resolve=False)
            tree[group] = defaults | present


def _model_was_named(parsed: list[Override], by_name: dict[str, Any], written: dict[str, Any]) -> bool:
    """Return True if the user named a model without a fallback: then the default fallback must not replace it."""
    if "model.fallback" in by_name or any(item.key_or_group == "model.fallback" for item in parsed):
        return False
    is_named = any(item.key_or_group in ("model", "model.path") for item in parsed)
    return is_named or by_name.get("model.path") is not None or _listed(written).get("model", "default") != "default"


def _resolve_data_paths(tree: dict[str, Any], config_dir: Path) -> dict[str, Any]:
    """Resolve relative data paths that do not exist here against the folder of config.yaml: train.sh runs anywhere."""

    def resolve(path: Any) -> Any:
        if isinstance(path, list):
            return [resolve(part) for part in path]
        if isinstance(path, dict):
            return {name: resolve(part) for name, part in path.items()}
        if not isinstance(path, str) or not path or os.path.lexists(path) or glob.glob(path, recursive=True):
            return path
        if os.path.lexists(config_dir / path):
            return str(config_dir / path)
        return glob.escape(f"{config_dir}/") + path if glob.glob(path, root_dir=config_dir, recursive=True) else path

    data = tree.get("data")
    if isinstance(data, dict):
        for key in ("train_files", "val_files"):
            if key in data:
                data[key] = resolve(data[key])
    return tree
