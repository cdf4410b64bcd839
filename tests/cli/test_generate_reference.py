"""conf/, config.yaml, the flags, README.md and the reference repeat the schema; a script keeps them identical."""

import importlib.util
import re

import pytest

from sft_recipe.cli.flags import FLAGS
from sft_recipe.config.schema import Config
from sft_recipe.config.validation import all_keys, fields
from tests.support.runs import ROOT

spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "scripts/generate_reference.py")
generate_reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate_reference)
GENERATED = generate_reference.generated()


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_generated_file_is_up_to_date(path):
    assert path.read_text(encoding="utf-8") == GENERATED[path], "run scripts/generate_reference.py"


def test_every_key_has_a_default_and_a_description():
    for key, info in fields():
        assert not info.is_required() and info.description, key


def test_every_generated_file_exists():
    names = {path.relative_to(ROOT).as_posix() for path in GENERATED}
    groups = {f"conf/{group}/default.yaml" for group in Config.model_fields if group != "trainer"}
    assert names >= groups | {"config.yaml", "sft_recipe/cli/flags.py", "docs/reference/configuration.md"}


def test_reference_lists_every_key():
    assert re.findall(r"(?m)^\| `([\w.]+)`", generate_reference.reference()) == all_keys()


def test_flag_table_lists_every_flag():
    table = generate_reference.flag_table()
    assert re.findall(r"(?m)^\| `([A-Z_]+)`", table) == [flag.variable for flag in FLAGS]


@pytest.mark.parametrize(("value", "text"), [(2e-5, "2.0e-5"), (0.1, "0.1"), (None, "null"), ((0.9, 1), "[0.9, 1]")])
def test_defaults_are_written_as_yaml(value, text):
    assert generate_reference._as_yaml(value) == text
