"""Accepts older names of keys in config.yaml, in files of conf/ and on the command line.

These are the long paths of verl's older layout, and keys that were renamed.
"""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sft_recipe.errors import ConfigError, notify

OLDER_GROUPS = {
    "actor_rollout_ref.actor.fsdp_config": "fsdp",
    "actor_rollout_ref.actor.optim": "optim",
}
OLDER_KEYS = {
    "data.allow_special_text": "data.parse_special_tokens",
    "data.shuffle": "data.order",
    "trainer.experiment_name": "trainer.run_name",
    "trainer.hang_timeout": "trainer.heartbeat_timeout",
}


def rename_override(text: str) -> str:
    """Return an override with the present name of its key; an older name prints a notice."""
    for older, name in OLDER_GROUPS.items():
        text = _renamed(rf"{re.escape(older)}(?=[.])", older, name, text)
    for older, name in OLDER_KEYS.items():
        text = _renamed(rf"{re.escape(older)}(?==)", older, name, text)
    return text


def notify_renamed(older: str, name: str) -> None:
    """Print a notice that names the present name of a key, a group or a resolver."""
    notify(f"{older} is the older name of {name}; it still works, but use {name}")


def _renamed(pattern: str, older: str, name: str, text: str) -> str:
    present, count = re.subn(rf"^(\+*){pattern}", rf"\1{name}", text)
    if count:
        notify_renamed(older, name)
    return present


def rename_key(group: str, key: str) -> str:
    """Return the present name of a key in a file of conf/<group>; an older name prints a notice."""
    older = f"{group}.{key}"
    if older not in OLDER_KEYS:
        return key
    notify_renamed(older, OLDER_KEYS[older])
    return OLDER_KEYS[older].removeprefix(f"{group}.")


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the dotted names and the values of everything in nested mappings."""
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    return {name: leaf for key in value for name, leaf in leaves(value[key], f"{prefix}.{key}".lstrip(".")).items()}


def merge_older_names(tree: DictConfig, written: dict[str, Any]) -> None:
    """Move the values under older names in `tree` to the present names, with a notice for each name.

    `written` is the content of config.yaml. Raises ConfigError if that sets a key under both names to different values.
    """
    by_name = leaves(written)
    for older, name in [*OLDER_GROUPS.items(), *OLDER_KEYS.items()]:
        parent, leaf = older.rsplit(".", 1)
        node = OmegaConf.select(tree, parent)
        if not isinstance(node, DictConfig) or leaf not in node:
            continue
        siblings: Any = OmegaConf.to_container(node, resolve=False)
        if older in OLDER_GROUPS and not isinstance(siblings[leaf], dict):
            continue
        notify_renamed(older, name)
        for key, value in leaves(siblings[leaf], name).items():
            present = by_name.get(key)
            if present is not None and present != value:
                both = f"{key} to {present} and {older}{key.removeprefix(name)} to {value}"
                raise ConfigError(f"config.yaml sets {both}; keep one of them")
            OmegaConf.update(tree, key, value, merge=True)
        node.pop(leaf)
    for parent in ("actor_rollout_ref.actor", "actor_rollout_ref"):
        _remove_if_empty(tree, parent)


def _remove_if_empty(tree: DictConfig, name: str) -> None:
    node = OmegaConf.select(tree, name)
    if isinstance(node, DictConfig) and len(node) == 0:
        outer, _, leaf = name.rpartition(".")
        (OmegaConf.select(tree, outer) if outer else tree).pop(leaf)
