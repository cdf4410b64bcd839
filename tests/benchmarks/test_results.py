"""Benchmarks write into one file, each its own section."""

from benchmarks.results import machine, table, write_section


def test_a_section_is_replaced_and_the_others_stay(tmp_path):
    path = tmp_path / "RESULTS.md"
    write_section("one", "## One\nfirst", path)
    write_section("two", "## Two\nsecond", path)
    alone = path.read_text()
    write_section("one", "## One\nagain, and <!-- begin: two\nlonger", path)
    text = path.read_text()
    assert "first" not in text and text.count("## One") == 1 and text.count("## Two") == 1
    write_section("one", "## One\nfirst", path)
    assert path.read_text() == alone


def test_a_table_is_one_that_markdown_reads():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_machine_is_named():
    assert "torch" in machine() and "cores" in machine()
