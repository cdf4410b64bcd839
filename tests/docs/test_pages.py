"""Checks what the documentation says against the code: flags, links, names of files and functions, the two READMEs."""

import ast
import json
import re

import pytest

from sft_recipe.cli.flags import FLAGS
from sft_recipe.data.formats import read_conversations
from tests.docs.markdown import PAGES, blocks, code_spans, local_links, prose_of, tables, text_of
from tests.support.runs import ROOT

FLAG_ROWS = {
    code_spans(row[0])[0]: row
    for table in tables("README.md")
    for row in table
    if re.match(r"`[A-Z_]{4,}`", row[0]) and len(row) == 4
}
ARCHITECTURE = prose_of("docs/architecture.md")


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_readme_lists_each_flag_with_default_and_key(flag):
    row = FLAG_ROWS[flag.variable]
    assert flag.default in row[1]
    assert f"`{flag.key}`" in row[3]
    assert flag.short is None or f"`--{flag.short}`" in row[0]


def test_readme_lists_no_other_flags():
    assert set(FLAG_ROWS) == {flag.variable for flag in FLAGS}


def test_readme_is_short():
    assert text_of("README.md").count("\n") <= 200


def test_ci_runs_the_test_command_of_the_readme():
    command = "./scripts/test.sh"
    for path in (".ci/run", ".github/workflows/ci.yml", "README.md"):
        assert command in text_of(path)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    assert not [str(path) for path in local_links(page) if not path.exists()]


def test_both_readmes_have_the_same_code_blocks():
    english, chinese = ([(b.language, b.commands, b.reason) for b in blocks(page)] for page in PAGES[:2])
    assert english == chinese


def test_both_readmes_have_the_same_tables():
    """Key columns are equal: for flags the variable, the default that is code and the key, elsewhere all code."""
    for english, chinese in zip(tables("README.md"), tables("README.zh.md"), strict=True):
        for row, translated in zip(english, chinese, strict=True):
            if row[0] in FLAG_ROWS or len(row) == 4:
                assert (row[0], row[3]) == (translated[0], translated[3])
                assert code_spans(row[1]) == code_spans(translated[1])
            else:
                assert [code_spans(cell) for cell in row] == [code_spans(cell) for cell in translated]


def test_both_readmes_have_the_same_sections_and_links():
    english, chinese = (text_of(page) for page in PAGES[:2])
    assert len(re.findall(r"^#+ ", english, re.M)) == len(re.findall(r"^#+ ", chinese, re.M))
    links = [set(local_links(page)) - {ROOT / name for name in PAGES[:2]} for page in PAGES[:2]]
    assert links[0] == links[1]


def test_architecture_names_existing_files():
    paths = {path for span in code_spans(ARCHITECTURE) for path in re.findall(r"^[\w./]+\.(?:py|sh|yaml|md)$", span)}
    folders = {span for span in code_spans(ARCHITECTURE) if re.fullmatch(r"(sft_recipe|tests)/[\w/]*/", span)}
    assert len(paths) > 30 and len(folders) > 10
    assert not sorted(path for path in paths | folders if not (ROOT / path).exists())


def test_architecture_names_existing_functions():
    """In tables with a column of functions, each one is defined in the file of its row, or for scripts occurs in it."""
    missing, checked = [], 0
    for table in tables("docs/architecture.md"):
        for row in table:
            files = [index for index in (0, 1) if re.fullmatch(r"`[\w./]+\.(py|sh)`", row[index])]
            if not files:
                continue
            path, names = code_spans(row[files[0]])[0], code_spans(row[files[0] + 1])
            checked += len(names)
            missing += [f"{path}: {name}" for name in names if name not in _defined_names(path)]
    assert checked > 30
    assert not missing


def _defined_names(path: str) -> set[str]:
    if not (ROOT / path).is_file():
        return set()
    if path.endswith(".sh"):
        return set(re.findall(r"\w+", text_of(path)))
    names = set()
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/memory.md", "docs/configuration.md"])
def test_other_pages_name_existing_files(page):
    spans = [span.split()[0] for span in code_spans(prose_of(page))]
    paths = {span for span in spans if re.fullmatch(r"(sft_recipe|tests|scripts|benchmarks)/[\w/.]+", span)}
    assert not sorted(path for path in paths if not (ROOT / path).exists())


def test_example_data_is_200_pairs_half_of_them_chinese():
    records = json.loads(text_of("data/example_sft.json"))
    assert len(records) == 200
    assert len({record["prompt"] for record in records}) == len({record["response"] for record in records}) == 200
    chinese = sum(bool(re.search(r"[\u4e00-\u9fff]", record["response"] + record["prompt"])) for record in records)
    assert 90 <= chinese <= 110


@pytest.mark.parametrize("path", sorted((ROOT / "data").glob("example_*")), ids=lambda path: path.name)
def test_every_example_file_is_readable(path):
    assert len(list(read_conversations(path))) >= 6
