"""The peers' environments: one each, made where there is none yet, all on the project's own build of torch."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"  # exactly: a range could bring another build, with gigabytes of CUDA


@dataclass(frozen=True)
class Environment:
    """What pip installs beside torch, and what it takes away again."""

    packages: Sequence[str]
    without: Sequence[str] = ()

    @property
    def text(self) -> str:
        return "\n".join([TORCH, *self.packages, *(f"without {name}" for name in self.without)])


TRANSFORMERS = ("transformers==5.23.0", "datasets==5.2.0", "peft==0.21.2")
ENVIRONMENTS = {
    "trl": Environment(["trl==1.16.0", *TRANSFORMERS]),  # transformers' Trainer runs here too
    "trl-1.10": Environment(["trl==1.10.0", *TRANSFORMERS]),  # its loss in chunks is faster on a CPU
    # torchvision and torchaudio come as CUDA builds that do not load beside a CPU torch; text needs neither
    "llamafactory": Environment(["llamafactory==0.9.5"], without=["torchvision", "torchaudio"]),
    "torchtune": Environment(["torchtune==0.6.1", "torchao==0.14.1"]),  # newer torchao lacks a module that it imports
    "verl": Environment(
        [
            "verl==0.9.1",
            "transformers==5.10.4",
            *("uvicorn", "fastapi", "cachetools", "msgspec", "pyzmq"),  # what verl imports but does not ask for
        ]
    ),
}


class InstallFailed(Exception):
    """The last lines that pip printed."""


def python_of(name: str, folder: Path) -> str:
    """The Python of an environment under `folder`; it is made, which takes minutes, unless it is there whole."""
    environment = ENVIRONMENTS[name]
    home = folder / f"{name}-{hashlib.blake2b(environment.text.encode(), digest_size=4).hexdigest()}"
    python = home / "bin" / "python"
    complete = home / "complete.txt"
    if not complete.is_file():
        shutil.rmtree(home, ignore_errors=True)
        _run(sys.executable, "-m", "venv", str(home))
        for packages in ([TORCH, "numpy"], [TORCH, *environment.packages]):
            _run(str(python), "-m", "pip", "install", "--quiet", *packages)
        if environment.without:
            _run(str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *environment.without)
        complete.write_text(environment.text + "\n")
    return str(python)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr + done.stdout).strip().splitlines()
        raise InstallFailed(said[-1] if said else f"exit code {done.returncode}")
