"""Every package that the code imports is declared in pyproject.toml, and every declared one is used."""

import ast
import re
import sys
from importlib.metadata import packages_distributions

import pytest

from tests.support.runs import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

# Declared since verl's TrainingWorker imports them at run time without declaring them.
IMPORTED_BY_OTHERS = {"cachetools", "msgspec", "pyzmq"}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# In extras: imported only by the command that the extra is for, and perhaps not installed here.
OPTIONAL = {"lm_eval": "eval", "bitsandbytes": "bitsandbytes"}


def declared(extra: str | None = None) -> set[str]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    requirements = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {normalized(re.match(r"[\w.-]+", text)[0]) for text in requirements}


def imported() -> dict[str, set[str]]:
    """Top-level modules that sft_recipe imports, each with the distributions that provide it."""
    modules = set()
    for path in (ROOT / "sft_recipe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.partition(".")[0])
    providers = packages_distributions()
    names = modules - sys.stdlib_module_names - {"sft_recipe"}
    return {name: {normalized(provider) for provider in providers.get(name, [])} for name in names}


@pytest.mark.parametrize("module", sorted(imported()))
def test_every_imported_package_is_declared(module):
    providers = {normalized(module)} if module in OPTIONAL else imported()[module]
    assert providers & declared(OPTIONAL.get(module))


def test_every_declared_package_is_imported():
    used = {name for providers in imported().values() for name in providers}
    assert declared() - used == IMPORTED_BY_OTHERS
