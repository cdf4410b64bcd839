"""The peers' environments: one each, made where there is none yet, all on the project's own build of torch."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"  # exactly: a range could bring another build, with gigabytes of CUDA
PINS = {
    "trl": ["trl==1.16.0", "transformers==5.23.0", "datasets==5.2.0"],
    "verl": [
        "verl==0.9.1",
        "transformers==5.10.4",
        *("uvicorn", "fastapi", "cachetools", "msgspec", "pyzmq"),  # what verl imports but does not ask for
    ],
}


class InstallFailed(Exception):
    """pip's last words."""


def python_of(peer: str, folder: Path) -> str:
    """The Python of a peer's environment under `folder`; it is made, which takes minutes, unless it is there whole."""
    wanted = "\n".join([TORCH, *PINS[peer]])
    home = folder / f"{peer}-{hashlib.blake2b(wanted.encode(), digest_size=4).hexdigest()}"
    python = home / "bin" / "python"
    complete = home / "complete.txt"
    if not complete.is_file():
        shutil.rmtree(home, ignore_errors=True)
        _run(sys.executable, "-m", "venv", str(home))
        for packages in ([TORCH, "numpy"], [TORCH, *PINS[peer]]):
            _run(str(python), "-m", "pip", "install", "--quiet", *packages)
        complete.write_text(wanted + "\n")
    return str(python)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr + done.stdout).strip().splitlines()
        raise InstallFailed(said[-1] if said else f"exit code {done.returncode}")
