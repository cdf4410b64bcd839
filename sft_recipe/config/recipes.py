"""Recipes: files of conf/recipe/ that set keys of several groups, and are laid over config.yaml."""

from pathlib import Path
from typing import Any

from sft_recipe.config.aliases import leaves, rename_override
from sft_recipe.config.validation import all_keys, nearest
from sft_recipe.config.yaml_file import read_yaml
from sft_recipe.errors import ConfigError
from sft_recipe.files import user_path

SUFFIX = ".yaml"


def recipe_values(name: str, folders: list[Path]) -> dict[str, Any]:
    """Return the keys that a recipe sets, with their values; `name` is that of a file in `folders`, or a path.

    Raises ConfigError for an unknown recipe, with the nearest name, and for a file that sets an unknown key.
    """
    path = _find(name, folders)
    values = {rename_override(f"{key}=").rstrip("="): value for key, value in leaves(read_yaml(path)).items()}
    known = all_keys()
    if "trainer.recipe" in values:
        raise ConfigError(f"{path}: a recipe cannot name another recipe; remove trainer.recipe")
    for key in values:
        if not any(key == name or key.startswith(f"{name}.") for name in known):
            raise ConfigError(
                f"{path}: a recipe sets keys of the configuration, and {key} is none.{nearest(key, known)}"
            )
    return values


def describe_recipes(folders: list[Path]) -> str:
    """Return a table of all recipes: their names, and the first line of the comment in each file."""
    files = {path.stem: path for folder in reversed(folders) for path in folder.glob(f"*{SUFFIX}")}
    width = max(map(len, files), default=0) + 2
    return "\n".join(f"{name:{width}}{_title(path)}" for name, path in sorted(files.items()))


def _find(name: str, folders: list[Path]) -> Path:
    if name.endswith(SUFFIX) or "/" in name:
        if (path := user_path(name)).is_file():
            return path
        raise ConfigError(f"recipe {name}: there is no such file. Recipes with a name are listed by --recipes")
    if found := next((path for folder in folders if (path := folder / f"{name}{SUFFIX}").is_file()), None):
        return found
    known = sorted({path.stem for folder in folders for path in folder.glob(f"*{SUFFIX}")})
    raise ConfigError(
        f"recipe {name}: there is none with this name; there are {', '.join(known)}, or the path of a {SUFFIX} file."
        f"{nearest(name, known)}"
    )


def _title(path: Path) -> str:
    comments = (line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((text for text in comments if not text.startswith("@package")), "")
