"""Opens the pages in headless Chromium: hovering and keys, width on a phone, contrast and names of all elements."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from sft_recipe.report.compare import comparison_page
from sft_recipe.report.page import run_page
from tests.report.test_page import full_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = Path(__file__).with_name("probe.js").read_text(encoding="utf-8")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


# Chromium's windows are at least 500 pixels wide; a frame is as narrow as a phone.
FRAME = """<iframe width="{width}" height="900" srcdoc="{page}"
onload="document.title = this.contentDocument.title"></iframe>"""


def dom(page: str, folder: Path, is_dark: bool = False) -> str:
    """Return the HTML of a page after its scripts have run."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    scheme = ["--blink-settings=preferredColorScheme=0"] if is_dark else []
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *scheme]
    command += [f"--user-data-dir={folder}/profile", "--window-size=1400,1000", "--virtual-time-budget=2000"]
    done = subprocess.run([*command, "--dump-dom", f"file://{path}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def probe(page: str, folder: Path, width: int = 1280, is_dark: bool = False) -> dict:
    """Return what probe.js finds; the policy of the page would not let it run, so that it is removed."""
    opened = re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", f"<script>{PROBE}</script></body>")
    framed = FRAME.format(width=width, page=html.escape(opened))
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom(framed, folder, is_dark), re.S)[1]))


def pages() -> dict[str, str]:
    """Return the page of a run and of a comparison, in both languages."""
    other = replace(full_run(optim__lr=1e-4), folder=Path("other"))
    return {
        "run": run_page(full_run()),
        "run, zh": run_page(full_run(), "zh"),
        "comparison": comparison_page([full_run(), other]),
    }


def test_the_policy_of_the_page_lets_its_script_run(tmp_path):
    page = pages()["run"]
    sliders = r"<input type=\"range\"[^>]*\bhidden\b"
    assert len(re.findall(sliders, page)) == 6
    assert not re.findall(sliders, dom(page, tmp_path))


def test_values_are_read_by_keys_and_by_pointer(tmp_path):
    found = probe(pages()["run"], tmp_path)
    assert (found["closed"], found["left"]) == ("none", "none")
    assert found["steps"] == 60  # the evaluation at step 0, then 60 steps
    assert re.fullmatch(r"step 2; training [\d.]+ \(mean [\d.]+\); validation 2.5, step 0", found["byKey"]["spoken"])
    assert found["byKey"]["display"] == "grid" and found["byKey"]["shown"].startswith("step 2training")
    assert found["byPointer"].startswith("step 60training") and found["byPointer"].endswith("validation 1.8")


@pytest.mark.parametrize("name", ["run", "run, zh", "comparison"])
@pytest.mark.parametrize(("width", "is_dark"), [(1280, False), (390, True)])
def test_pages_fit_and_are_accessible(tmp_path, name, width, is_dark):
    found = probe(pages()[name], tmp_path, width, is_dark)
    assert found["texts"] > 80 and not found["problems"]
    assert found["page"] <= found["width"] == width
