"""Builds the site: every page, link and anchor in it must exist."""

import subprocess
import sys

import pytest

from tests.support.runs import ROOT

pytest.importorskip("material", reason="mkdocs-material is not installed; it is in the extra dev")


def test_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ROOT.glob("docs/**/*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        built = name / "index.html" if name.name != "index" else name.with_suffix(".html")
        assert (tmp_path / "site" / built).is_file()
