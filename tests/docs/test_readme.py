"""What the README says, and the example data: they are the first thing that a user meets."""

import json
import re

import pytest

from sft_recipe.cli.flags import FLAGS
from sft_recipe.data.formats import read_conversations
from tests.support.runs import ROOT

README = (ROOT / "README.md").read_text()
TABLE = {
    name: [cell.strip() for cell in row.split("|")]
    for row in re.findall(r"^\| (`[A-Z_]+`.*) \|$", README, re.MULTILINE)
    for name in re.findall(r"`([A-Z_]{4,})`", row.split("|")[0])
}


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_every_variable_stands_in_the_readme_with_default_and_key(flag):
    cells = TABLE[flag.variable]
    assert flag.default in cells[1].replace("`", "")
    assert f"`{flag.key}`" in cells[3]
    assert flag.short is None or f"--{flag.short}" in cells[0]


def test_the_readme_has_no_other_variables():
    assert set(TABLE) == {flag.variable for flag in FLAGS}


def test_ci_runs_the_readmes_test_command():
    command = "./scripts/test.sh"
    assert command in README and command in (ROOT / ".ci/run").read_text()


def test_the_examples_are_200_pairs_half_of_them_chinese():
    records = json.loads((ROOT / "data/example_sft.json").read_text())
    assert len(records) == 200
    assert len({record["prompt"] for record in records}) == len({record["response"] for record in records}) == 200
    chinese = sum(bool(re.search(r"[\u4e00-\u9fff]", record["response"] + record["prompt"])) for record in records)
    assert 90 <= chinese <= 110


@pytest.mark.parametrize("path", sorted((ROOT / "data").glob("example_*")), ids=lambda path: path.name)
def test_every_example_file_is_read(path):
    assert len(list(read_conversations(path))) >= 6
