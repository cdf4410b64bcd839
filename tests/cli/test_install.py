"""The first start shows pip's progress in a few lines, and its complete output where it fails."""

import subprocess
import sys

import pytest

from tests.support.runs import ROOT

FAKE_PIP = """
import sys
lines = ["Collecting torch==2.13.0", "  Downloading torch-2.13.0-cp311-manylinux.whl (2 MB)", "Collecting verl"]
lines += [f"noise {number}" for number in range(500)]
lines += ["Installing collected packages: torch, verl, rich", "ERROR: no space left on device"]
print(*lines, sep="\\n")
sys.exit(int(sys.argv[-1]))
"""


def install(tmp_path, code: int) -> subprocess.CompletedProcess:
    (tmp_path / "pip.py").write_text(FAKE_PIP)
    command = [sys.executable, str(ROOT / "scripts/install.py"), str(tmp_path / "log"), "install", str(code)]
    # The script's folder comes first on the path, so that pip is found in the current one by PYTHONPATH.
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, env=environment, text=True, capture_output=True, cwd=tmp_path)


def test_a_successful_installation_takes_a_few_lines(tmp_path):
    done = install(tmp_path, 0)
    assert done.returncode == 0 and not done.stdout
    lines = done.stderr.splitlines()
    assert len(lines) <= 4
    assert any("installing 3 packages" in line for line in lines) and lines[-1].endswith("installed")
    assert (tmp_path / "log").read_text().count("noise") == 500


@pytest.mark.parametrize("code", [1, 23])
def test_a_failed_installation_shows_the_end_of_the_log_and_its_path(tmp_path, code):
    done = install(tmp_path, code)
    assert done.returncode == code
    assert "ERROR: no space left on device" in done.stderr and str(tmp_path / "log") in done.stderr
    assert len(done.stderr.splitlines()) < 25
