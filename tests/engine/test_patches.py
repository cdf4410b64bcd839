"""Each private API of a library is checked, and one message reports all that a library has changed."""

import ast
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from sft_recipe.engine import patches
from sft_recipe.engine.cpu.platform import use_cpu
from sft_recipe.errors import PreflightError
from tests.support.runs import ROOT

ALL = patches.EVERYWHERE + patches.ON_CPUS
WITH_PARAMETERS = [api for api in ALL if api.parameters]
WITH_CALLER = [api for api in ALL if api.used_by]


@pytest.fixture(autouse=True, scope="module")
def engine():
    use_cpu()
    import_module("sft_recipe.engine.sft_engine")


def owner_and_name(path):
    """The object that holds the last name of a path, and that name."""
    module, _, attributes = path.partition(":")
    *parents, name = attributes.split(".")
    owner = torch.ops if module == "torch.ops" else import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def remove(path, monkeypatch):
    """Make the name unknown, as if the library had renamed it."""
    resolve = patches._resolve

    def resolve_others(other):
        if other == path:
            raise AttributeError(path)
        return resolve(other)

    monkeypatch.setattr(patches, "_resolve", resolve_others)


def error_message(device):
    with pytest.raises(PreflightError) as caught:
        patches.check(device)
    return str(caught.value)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_installed_libraries_have_all_private_apis(device):
    patches.check(device)


@pytest.mark.parametrize("api", ALL, ids=lambda api: api.path)
def test_a_missing_name_is_reported_with_versions(api, monkeypatch):
    remove(api.path, monkeypatch)
    message = error_message("cpu")
    assert f"{api.path.replace(':', '.')} is missing" in message
    assert f"{api.package} {version(api.package)}" in message
    assert f"pip install '{api.package}{patches.SUPPORTED[api.package]}'" in message
    with pytest.raises(PreflightError, match="is missing"):
        api.find()


REMOVABLE = [api for api in ALL if not api.path.startswith(("torch:", "torch.ops:", "torch.nn:"))]


@pytest.mark.parametrize("api", REMOVABLE, ids=lambda api: api.path)
def test_a_name_removed_from_the_library_is_noticed(api, monkeypatch):
    monkeypatch.delattr(*owner_and_name(api.path))
    assert f"{api.path.replace(':', '.')} is missing" in error_message("cpu")


@pytest.mark.parametrize("api", WITH_PARAMETERS, ids=lambda api: api.path)
def test_other_parameters_are_noticed(api, monkeypatch):
    monkeypatch.setattr(patches, "_resolve", lambda path: lambda renamed: None)
    assert f"takes (renamed) instead of ({', '.join(api.parameters)})" in api.problem()


def test_a_name_that_is_no_longer_a_function_is_noticed(monkeypatch):
    monkeypatch.setattr(patches, "_resolve", lambda path: SimpleNamespace())
    assert "is not a function" in WITH_PARAMETERS[0].problem()


@pytest.mark.parametrize("api", WITH_CALLER, ids=lambda api: api.path)
def test_a_library_that_no_longer_calls_the_name_is_noticed(api, monkeypatch):
    owner, name = owner_and_name(api.used_by)
    monkeypatch.setattr(owner, name, lambda: None)
    assert f"no longer calls {api.path.replace(':', '.')}" in error_message("cpu")


def test_all_problems_are_in_one_message(monkeypatch):
    def resolve_nothing(path):
        raise AttributeError(path)

    monkeypatch.setattr(patches, "_resolve", resolve_nothing)
    message = error_message("cpu")
    assert all(package in message for package in patches.SUPPORTED)
    assert message.count("pip install") == 1 and "\n" not in message


def test_supported_versions_are_those_of_pyproject():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{package}{versions}"' in pyproject for package, versions in patches.SUPPORTED.items())


GPU_WITHOUT_CPU_OPERATORS = """
import torch
from sft_recipe.engine.cpu.platform import use_cpu

use_cpu()  # verl needs a platform, and there is no GPU here; PyTorch itself looks the operator up while it is imported
original = torch._ops._OpNamespace.__getattr__

def without_cpu_kernels(self, name):
    if name == "_softmax_backward_data":
        raise AttributeError(name)
    return original(self, name)

torch._ops._OpNamespace.__getattr__ = without_cpu_kernels
vars(torch.ops.aten).pop("_softmax_backward_data", None)
import sft_recipe.engine.sft_engine
from sft_recipe.engine import patches
from sft_recipe.errors import PreflightError

patches.check("cuda")
try:
    patches.check("cpu")
except PreflightError as error:
    print(error)
"""


def test_gpus_do_not_need_the_operators_of_cpus():
    command = [sys.executable, "-W", "ignore", "-c", GPU_WITHOUT_CPU_OPERATORS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "torch.ops.aten._softmax_backward_data.default is missing" in result.stdout


@pytest.fixture
def process_group():
    """A process group of one rank, unless there is one."""
    exists = torch.distributed.is_initialized()
    if not exists:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    if not exists:
        torch.distributed.destroy_process_group()


def test_dtensor_like_keeps_the_layout_and_takes_another_local_part(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    original = distribute_tensor(torch.arange(6.0), init_device_mesh("cpu", (1,)), [Shard(0)])
    copy = patches.dtensor_like(torch.zeros(6), original)
    assert isinstance(copy, DTensor) and copy.placements == original.placements and not copy.to_local().any()


ELSEWHERE = {"rows._fingerprint", "atexit._run_exitfuncs", "parser._actions", "os._exit"}  # but one of Python's own


PUBLIC = {"_replace", "_asdict", "_fields"}  # of named tuples


def private_attributes(path):
    """Attributes like `module._name`, except those of `self`, `cls` and `super()`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls", "super()") and node.attr not in PUBLIC:
                yield f"{owner}.{node.attr}"


def test_no_other_module_uses_private_names():
    modules = (ROOT / "sft_recipe").rglob("*.py")
    # A rehearsal imitates torch.cuda in a process that does nothing else; its tests run all that it uses.
    paths = [path for path in modules if path.name != "patches.py" and path.parent.name != "rehearsal"]
    assert {name for path in paths for name in private_attributes(path)} <= ELSEWHERE
