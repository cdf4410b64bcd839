"""Writes the JSON schema of config.yaml, by which editors complete and check it."""

from typing import Any

from sft_recipe.config.schema import Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"
REFERENCE = {"type": "string", "pattern": r"\$\{", "description": "a reference to another key: ${optim.lr}"}
# What config.yaml has beside the groups of keys.
OTHERS: dict[str, Any] = {
    "defaults": {"type": "array", "description": "the files of conf/<group>/ that are read first, in order"},
    "format_version": {"type": "integer", "minimum": 1, "description": "written by a run; newer versions are refused"},
    "hydra": {"type": "object", "description": "settings of Hydra"},
}
OF_FLAGS = ("flag", "short", "shown_default", "yaml")  # of config/group.py, without a meaning in a JSON schema


def config_schema() -> dict[str, Any]:
    """Return the JSON schema of config.yaml: every key with its type, limits, default and meaning; none is required."""
    schema = Config.model_json_schema()
    groups = {name: _group(group) for name, group in schema.pop("$defs").items()}
    top = _group(schema)
    return {"$schema": DIALECT, **top, "properties": {**OTHERS, **top["properties"]}, "$defs": groups}


def _group(schema: dict[str, Any]) -> dict[str, Any]:
    properties = {name: _key(key) for name, key in schema["properties"].items()}
    return {key: value for key, value in schema.items() if key != "required"} | {"properties": properties}


def _key(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a key, which also accepts a reference; a group of keys is returned as it is."""
    if "$ref" in schema:
        return schema
    about = {name: schema[name] for name in ("title", "description", "default") if name in schema}
    rules = {name: value for name, value in schema.items() if name not in (*about, *OF_FLAGS)}
    options = rules.pop("anyOf", None) or [rules]
    return about | {"anyOf": [*options, REFERENCE]}
