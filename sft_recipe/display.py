"""What people read in a terminal or a browser: control characters made visible, percentages, the look of HTML pages."""

import base64
import hashlib
import re
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sft_recipe.language import fill, plural

# Characters that control a terminal, change the direction of text or are invisible: replaced by a visible symbol.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff]")


def printable(text: str) -> str:
    """Return the text with visible symbols in place of characters that control a terminal."""
    return CONTROL.sub(lambda match: control_symbol(match[0]), text)


def control_symbol(character: str) -> str:
    """Return the visible symbol of a control character; a tab keeps its width."""
    code = ord(character)
    if code < 0x20:
        return {"\t": "⇥\t", "\n": "⏎"}.get(character, chr(0x2400 + code))
    return "␡" if code == 0x7F else f"<U+{code:04X}>"


def percent(fraction: float) -> str:
    """Return a percentage that shows 0% for none only, and 100% for all only."""
    if 0 < fraction < 0.001 or 0.999 < fraction < 1:
        return "<0.1%" if fraction < 0.5 else ">99.9%"
    return f"{100 * fraction:.1f}%" if 0 < fraction < 0.1 or 0.99 < fraction < 1 else f"{100 * fraction:.0f}%"


def byte_size(size: int) -> str:
    """Return a number of bytes in the largest unit that it has one of: `1.50 GB`, `20.00 KB`, `999 bytes`."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return plural(size, "byte")


def page_environment(
    package: str, folder: str, language: str, translate: Callable[[str], str], script: str = ""
) -> Environment:
    """Return the environment of a package's page templates: all values are escaped, and an unknown name is an error.

    `t` translates an English text, then fills in values by their names. `style` is the common style of all pages, and
    `script` the only script that the policy of a page allows.
    """
    environment = Environment(
        loader=PackageLoader(package, folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,  # a run that trains while the package is upgraded keeps its templates
    )
    environment.filters |= {"n": "{:,}".format, "percent": percent, "clean": printable}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"; script-src 'sha256-{digest}'" if script else ""
    constants: dict[str, Any] = {
        "style": Markup(files("sft_recipe").joinpath("display.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "t": lambda text, **values: fill(translate(text), **values),
        "lang": {"zh": "zh-CN"}.get(language, language),
        "policy": Markup(f"default-src 'none'; style-src 'unsafe-inline'{allowed}"),
    }
    environment.globals |= constants
    return environment
