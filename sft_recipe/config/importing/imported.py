"""The overrides that a configuration of another project becomes, and the settings that could not be mapped."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from sft_recipe.config.foreign_names import BITSANDBYTES
from sft_recipe.config.validation import all_keys, build_config
from sft_recipe.errors import ConfigError

REQUIRED_GROUPS: dict[str, Any] = {"model": {}, "data": {}, "optim": {}, "fsdp": {}, "lora": {}}
MISSING = {
    "model.path": "no model is named: the command would train the default model; add --model",
    "data.train_files": "no training data is named: the command would train on the example data; add --train_data",
}
OFF: tuple[Any, ...] = (None, False, "", "none", "None", 0, 0.0, [], {})  # a setting with such a value asks for nothing


def with_defaults(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file; one that is null counts as left out."""
    return {**given, **defaults, **{name: value for name, value in given.items() if value is not None}}


@dataclass
class Imported:
    """Collects the values of our keys, and in words what could not be mapped, from the settings `given`."""

    given: Mapping[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    unmapped: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a setting, which thereby counts as read."""
        self.read.add(name)
        value = self.given.get(name)
        return default if value is None else value

    def set(self, key: str, value: Any, origin: str) -> None:
        """Set one of our keys; a value that it does not accept is listed as not mapped. `origin` is their setting."""
        if "$" in str(value):
            self.skip(origin, value, f"only the shell knows it; set {key}")
            return
        try:
            group, _, rest = key.partition(".")
            inner: Any = value
            for name in reversed(rest.split(".")):
                inner = {name: inner}
            enabled = {"lora": {**inner, "enabled": True}} if group == "lora" else {group: inner}
            build_config({**REQUIRED_GROUPS, **enabled})
        except ConfigError as error:
            self.skip(origin, value, str(error).rpartition("  - ")[2])
            return
        self.values[key] = value

    def skip(self, name: str, value: Any, reason: str) -> None:
        """List a setting that is not mapped, with the reason."""
        self.read.add(name)
        self.unmapped.append(f"{name}: {value} ({reason})")

    def mapping(self, name: str, value: Any) -> dict[str, Any]:
        """Return `value`, {} where there is none, or where it is no object, which is listed as not mapped."""
        if isinstance(value, dict):
            return value
        if value is not None:
            self.skip(name, value, "it is not an object")
        return {}

    def map(self, table: Mapping[str, str]) -> None:
        """Set our keys to the settings in a table {their name: our key}."""
        for name, key in table.items():
            if (value := self.get(name)) is not None:
                self.set(key, value, name)

    def note_missing(self) -> None:
        """List first that no model or no data is named: our defaults would take their place."""
        self.unmapped[:0] = [note for key, note in MISSING.items() if not self.values.get(key)]

    def replace_optimizer(self) -> None:
        """List an optimizer of bitsandbytes that the run cannot have, and use AdamW."""
        if self.values.get("optim.optimizer_impl") != BITSANDBYTES:
            return
        ranks = [self.values.get(f"trainer.{name}", 1) for name in ("n_gpus_per_node", "nnodes")]
        if ranks == [1, 1] and self.values.get("fsdp.strategy") != "fsdp2":
            return
        del self.values["optim.optimizer_impl"]
        name = self.values.pop("optim.optimizer", "AdamW")
        self.skip("optim.optimizer", name, "those of bitsandbytes train on one GPU, without fsdp2; AdamW is used")

    def list_rest(self, place: str, settings: Mapping[str, Any], known: Container[str]) -> None:
        """List the settings of a data set that ask for something and are not `known`."""
        for name, value in settings.items():
            if name not in known and value not in (None, False, "", [], {}):
                self.skip(f"{place}, {name}", value, "no counterpart")

    def finish(self, ignored: Callable[[str], bool]) -> None:
        """List every other setting that asks for something, unless it is `ignored`: without effect on the model."""
        for name, value in self.given.items():
            if name not in self.read and value not in OFF and not ignored(name):
                self.skip(name, value, "no counterpart")


def is_our_key(key: str) -> bool:
    """Return whether our configuration has this key."""
    return key in all_keys()
