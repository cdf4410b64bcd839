"""The import rule of docs/architecture.md: data flows one way; imports follow it and never go back."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.runs import ROOT

PACKAGE = ROOT / "sft_recipe"
MODULES = sorted(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py"))
NAMES = {module.removesuffix(".__init__") for module in MODULES}
DYNAMIC = ("import_module", "importlib.import_module", "__import__")


@dataclass(frozen=True)
class Import:
    """`name` is a module, or a name in one. Lazy: done inside a function. For types: never done in a run."""

    name: str
    lazy: bool = False
    for_types: bool = False

    def is_of(self, *packages: str) -> bool:
        return any(f"{self.name}.".startswith(f"{package}.") for package in packages)


def imports(module: str) -> list[Import]:
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return list(walk(ast.parse(path.read_text(encoding="utf-8")), module))


def walk(node: ast.AST, module: str, lazy: bool = False, for_types: bool = False) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, lazy, for_types) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = module.split(".")[: -node.level] if node.level else []
        source = ".".join([*above, *([node.module] if node.module else [])])
        yield from (Import(f"{source}.{alias.name}", lazy, for_types) for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in DYNAMIC:
        names = [name.value for name in node.args[:1] if isinstance(name, ast.Constant)]
        yield from (Import(str(name), lazy, for_types) for name in names)
    lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    guarded = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    for child in ast.iter_child_nodes(node):
        yield from walk(child, module, lazy, for_types or (guarded and child in node.body))


def ours(found: Import) -> str | None:
    """The module of this package that is imported: `sft_recipe.data.token_store` for its `open_store`."""
    name = found.name
    while name and name not in NAMES:
        name = name.rpartition(".")[0]
    return name or None


def offences(module: str, *packages: str) -> list[str]:
    return [found.name for found in imports(module) if found.is_of(*packages)]


def test_there_is_something_to_check():
    assert {"sft_recipe.data.batching", "sft_recipe.engine.sft_engine", "sft_recipe.main_sft"} <= NAMES
    assert any(found.name.startswith("verl.") for found in imports("sft_recipe.engine.sft_engine"))


# Packages in the order in which data flows; a module may import from its own package and from those before it.
ORDER = (
    "errors", "timing", "files", "progress", "language", "display", "config", "distributed", "models", "data",
    "engine", "checkpoint", "evaluation", "export", "chat", "tracking", "report", "training", "main_sft", "launch",
    "readiness", "cli",
)  # fmt: skip
USES_VERL = ("engine", "checkpoint", "tracking", "training")


def place(module: str) -> int:
    return ORDER.index(module.split(".")[1])


@pytest.mark.parametrize("module", sorted(NAMES - {"sft_recipe"}))
def test_imports_follow_the_data_and_never_go_back(module):
    used = {ours(found) for found in imports(module)} - {None, "sft_recipe"}
    assert not [other for other in used if place(other) > place(module)]


@pytest.mark.parametrize("module", sorted(NAMES - {"sft_recipe"}))
def test_only_what_drives_the_engine_imports_verl(module):
    assert module.split(".")[1] in USES_VERL or not offences(module, "verl")


def test_errors_import_nothing_of_ours():
    assert not offences("sft_recipe.errors", "sft_recipe")


def test_no_module_imports_one_that_imports_it():
    """Lazy imports count: a cycle that only shows when a function runs is a cycle. Those for types do not."""
    uses = {
        module.removesuffix(".__init__"): {ours(found) for found in imports(module) if not found.for_types} - {None}
        for module in MODULES
    }
    done: set[str] = set()
    while ready := {module for module, used in uses.items() if module not in done and used - {module} <= done}:
        done |= ready
    assert not {module: sorted(used - done) for module, used in uses.items() if module not in done}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import verl.utils as u", Import("verl.utils")),
        ("from verl import utils", Import("verl.utils")),
        ("def f():\n    from torch.distributed import run", Import("torch.distributed.run", lazy=True)),
        ("if TYPE_CHECKING:\n    import verl", Import("verl", for_types=True)),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import verl", Import("verl")),
        ("from . import formats", Import("sft_recipe.data.formats")),
        ("from ..engine import loss", Import("sft_recipe.engine.loss")),
        ("f = lambda: importlib.import_module('verl')", Import("verl", lazy=True)),
        ("try:\n    import verl\nexcept ImportError:\n    pass", Import("verl")),
    ],
)
def test_no_way_to_import_is_overlooked(source, expected):
    assert list(walk(ast.parse(source), "sft_recipe.data.token_store")) == [expected]
