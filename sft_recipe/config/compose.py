"""Reads config.yaml, conf/ and overrides through Hydra into one tree; later overrides win, groups and values alike."""

import glob
import os
import re
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sft_recipe.config.schema import Config, all_keys, build_config, nearest, text_keys
from sft_recipe.errors import ConfigError

HOME = Path(__file__).resolve().parents[2]
GROUPS = ("model", "data", "optim", "fsdp", "lora")
# Older names, accepted in config.yaml, in files of conf/ and on the command line: the long paths of verl's older
# layout, and keys that were renamed.
OLDER_GROUPS = {
    "actor_rollout_ref.actor.fsdp_config": "fsdp",
    "actor_rollout_ref.actor.optim": "optim",
}
OLDER_KEYS = {
    "data.allow_special_text": "data.parse_special_tokens",
    "trainer.hang_timeout": "trainer.heartbeat_timeout",
}


def _if_else(condition: Any, value: Any, otherwise: Any) -> Any:
    return value if str(condition).lower() in ("true", "1", "yes", "on", "y", "t") else otherwise


# In conf/: ${if_else:${lora.enabled},a,b} is a where LoRA is enabled, else b; ${either:...} is its older name.
OmegaConf.register_new_resolver("if_else", _if_else, replace=True)
OmegaConf.register_new_resolver("either", _if_else, replace=True)


def load_config(overrides: list[str], config_dir: Path = HOME, config_name: str = "config") -> Config:
    """Compose and check the tree.

    `overrides` are Hydra's: `optim.lr=1e-5`, `lora=r16`; they are applied from left to right. A group choice puts
    the values of its file over what stands before it, config.yaml included.

    Raises ConfigError: no such file, group or key; a value of the wrong type; a sweep.
    """
    config_dir = config_dir.expanduser().resolve()
    root = config_dir / f"{config_name.removesuffix('.yaml')}.yaml"
    if not root.is_file():
        raise ConfigError(f"there is no {root}; --config-path names the folder of config.yaml, --config-name the file")
    config_dir = root.parent
    parsed = _parse(overrides)
    choices = [item for item in parsed if _is_choice(item)]
    written = _read_yaml(root)
    tree = _compose(root, written, choices, config_dir)
    try:
        _merge_older_names(tree, written)
        for item in parsed:
            if _is_choice(item):
                _choose(tree, item, config_dir)
            else:
                _assign(tree, item)
        if _model_was_named(parsed, written) and isinstance(tree.get("model"), DictConfig):
            tree.model.fallback = None
        resolved = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {error}") from None
    assert isinstance(resolved, dict)
    return build_config(_beside_config({str(key): value for key, value in resolved.items()}, config_dir))


def parse_config_args(args: list[str]) -> dict[str, Any]:
    """`--config-path=DIR --config-name=NAME`, as Hydra spells them, as arguments of load_config."""
    found: dict[str, Any] = {}
    for text in args:
        name, _, value = text.partition("=")
        if name in ("--config-path", "-cp"):
            found["config_dir"] = Path(value)
        elif name in ("--config-name", "-cn"):
            found["config_name"] = value
        else:
            raise ConfigError(f"unknown argument {text}; known are --config-path, --config-name and Hydra overrides")
    return found


def to_yaml(config: Config) -> str:
    """The resolved configuration as a file that can be used as config.yaml again, in the same environment."""
    return yaml.safe_dump(config.public(), sort_keys=False, allow_unicode=True)


def _parse(overrides: list[str]) -> list[Override]:
    parser = OverridesParser.create()
    result = []
    for text in overrides:
        for older, name in [*OLDER_GROUPS.items(), *OLDER_KEYS.items()]:
            if re.match(rf"\+*{re.escape(older)}{'=' if older in OLDER_KEYS else '[.]'}", text):
                text = text.replace(older, name, 1)
        try:
            item = parser.parse_override(text)
        except HydraException:
            example = "overrides look like optim.lr=1e-5 or lora=r16"
            raise ConfigError(f"cannot read the override {text!r}; {example}") from None
        if item.is_delete() or item.is_sweep_override():
            what = "deleting a key" if item.is_delete() else "a sweep over several values"
            raise ConfigError(f"{text}: {what} is not supported; give each key one value")
        result.append(item)
    return result


def _is_choice(item: Override) -> bool:
    return item.key_or_group in GROUPS and isinstance(item.value(), str)


def _choice_file(item: Override, config_dir: Path) -> Path:
    folders = [config_dir / "conf" / item.key_or_group, HOME / "conf" / item.key_or_group]
    for folder in folders:
        if (folder / f"{item.value()}.yaml").is_file():
            return folder / f"{item.value()}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    hint = nearest(str(item.value()), known)
    raise ConfigError(f"{item.key_or_group}={item.value()}: there is {', '.join(known)}.{hint}")


def _compose(root: Path, written: dict[str, Any], choices: list[Override], config_dir: Path) -> DictConfig:
    for item in choices:
        _choice_file(item, config_dir)
    folders = [folder for folder in dict.fromkeys([config_dir / "conf", HOME / "conf"]) if folder.is_dir()]
    places = ",".join(QuotedString(f"file://{folder}", Quote.single).with_quotes() for folder in folders)
    # Hydra replaces only groups of the defaults list; a resolved config.yaml has none, and _choose is enough there.
    chosen = {item.key_or_group: item.value() for item in choices if item.key_or_group in _listed(written)}
    texts = [f"{group}={choice}" for group, choice in chosen.items()]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir), version_base=None):
            tree = compose(root.stem, overrides=[f"hydra.searchpath=[{places}]", *texts])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{root} cannot be used: {str(error).strip()}") from None
    OmegaConf.set_struct(tree, False)
    return tree


def _read_yaml(path: Path) -> dict[str, Any]:
    """What the file itself says, interpolations as they stand."""
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error).strip()}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} cannot be used: it holds a list, not keys")
    return {str(key): value for key, value in loaded.items()}


def _listed(written: dict[str, Any]) -> dict[str, Any]:
    """The groups of the defaults list, each with its choice."""
    entries = written.get("defaults")
    pairs = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return {group: choice for entry in pairs for group, choice in entry.items()}


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names and values of whatever stands in nested mappings."""
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    return {name: leaf for key in value for name, leaf in _leaves(value[key], f"{prefix}.{key}".lstrip(".")).items()}


def _merge_older_names(tree: DictConfig, written: dict[str, Any]) -> None:
    """Move what is written under older names to the names of today."""
    own = _leaves(written)
    for older, name in [*OLDER_GROUPS.items(), *OLDER_KEYS.items()]:
        parent, leaf = older.rsplit(".", 1)
        node = OmegaConf.select(tree, parent)
        if not isinstance(node, DictConfig) or leaf not in node:
            continue
        found: Any = OmegaConf.to_container(node, resolve=False)
        if older in OLDER_GROUPS and not isinstance(found[leaf], dict):
            continue
        for key, value in _leaves(found[leaf], name).items():
            twin = own.get(key)
            if twin is not None and twin != value:
                both = f"{key} to {twin} and {older}{key.removeprefix(name)} to {value}"
                raise ConfigError(f"config.yaml sets {both}; keep one of them")
            OmegaConf.update(tree, key, value, merge=True)
        node.pop(leaf)
    for parent in ("actor_rollout_ref.actor", "actor_rollout_ref"):
        node = OmegaConf.select(tree, parent)
        if isinstance(node, DictConfig) and len(node) == 0:
            outer, _, leaf = parent.rpartition(".")
            (OmegaConf.select(tree, outer) if outer else tree).pop(leaf)


def _choose(tree: DictConfig, item: Override, config_dir: Path) -> None:
    group = item.key_or_group
    own = _read_yaml(_choice_file(item, config_dir))
    own.pop("defaults", None)
    for older, name in OLDER_KEYS.items():
        if older.startswith(f"{group}.") and (key := older.removeprefix(f"{group}.")) in own:
            own[name.removeprefix(f"{group}.")] = own.pop(key)
    OmegaConf.update(tree, group, own, merge=True)


def _assign(tree: DictConfig, item: Override) -> None:
    key, known = item.key_or_group, all_keys()
    if not any(name == key or name.startswith(key + ".") or key.startswith(name + ".") for name in known):
        raise ConfigError(f"unknown key {key}.{nearest(key, known)}")
    value = item.value()
    if isinstance(value, int | float) and key in text_keys() and item.input_line:
        value = item.input_line.partition("=")[2].strip()  # a folder 2024_01_02 stays that, not the number 20240102
    OmegaConf.update(tree, key, value, merge=True, force_add=True)


def _model_was_named(parsed: list[Override], written: dict[str, Any]) -> bool:
    """A model that the user named is never replaced by the fallback, unless the fallback is the user's as well."""
    own = _leaves(written)
    if "model.fallback" in own or any(item.key_or_group == "model.fallback" for item in parsed):
        return False
    touched = any(item.key_or_group in ("model", "model.path") for item in parsed)
    return touched or own.get("model.path") is not None or _listed(written).get("model", "default") != "default"


def _beside_config(tree: dict[str, Any], config_dir: Path) -> dict[str, Any]:
    """A relative data path not found here is looked for beside config.yaml, so that train.sh runs from anywhere."""

    def place(path: Any) -> Any:
        if isinstance(path, list):
            return [place(part) for part in path]
        if not isinstance(path, str) or not path or os.path.lexists(path) or glob.glob(path, recursive=True):
            return path
        if os.path.lexists(config_dir / path):
            return str(config_dir / path)
        return glob.escape(f"{config_dir}/") + path if glob.glob(path, root_dir=config_dir, recursive=True) else path

    data = tree.get("data")
    if isinstance(data, dict):
        for key in ("train_files", "val_files"):
            if key in data:
                data[key] = place(data[key])
    return tree
