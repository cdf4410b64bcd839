"""Compiles guard.cpp against the installed PyTorch, and loads it."""

import ctypes
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from sft_recipe.errors import PreflightError, first_line

SOURCE = Path(__file__).with_name("guard.cpp")


def build(folder: Path) -> Path:
    """Compile the guard and return the path of the library in `folder`; takes 3 s and does not import PyTorch.

    Raises PreflightError without a compiler, without PyTorch, with a PyTorch that has CUDA, or if compiling fails.
    """
    found, compiler = find_spec("torch"), shutil.which("g++") or shutil.which("clang++")
    if found is None or found.origin is None or compiler is None:
        raise PreflightError("a rehearsal needs PyTorch and a C++ compiler (g++ or clang++)")
    torch = Path(found.origin).parent
    if (torch / "lib/libtorch_cuda.so").exists():
        raise PreflightError("a rehearsal needs a PyTorch for CPUs: this one has CUDA itself")
    library = folder / "guard.so"
    options = ["-shared", "-fPIC", "-O1", "-std=c++20", f"-Wl,-rpath,{torch / 'lib'}"]
    headers = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    done = subprocess.run(
        [compiler, *options, *headers, str(SOURCE), "-o", str(library), *libraries], capture_output=True, text=True
    )
    if done.returncode:
        problem = first_line(RuntimeError(done.stderr))
        raise PreflightError(f"the device guard of the rehearsal cannot be compiled by {compiler}: {problem}")
    return library


def load(library: Path) -> None:
    """Load the guard into this process, for good. PyTorch must not be imported yet: it looks for its hooks once."""
    if not ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL).is_active():
        raise RuntimeError("the device guard was loaded after PyTorch")
