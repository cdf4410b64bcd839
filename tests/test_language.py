"""The language of reports: the flag, then the variable, then English; anything else is an error."""

import pytest

from sft_recipe.errors import ConfigError
from sft_recipe.language import VARIABLE, chosen_language, fill, plural


@pytest.mark.parametrize(
    ("option", "variable", "language"),
    [
        (None, None, "en"),
        (None, "", "en"),
        (None, "zh", "zh"),
        (None, "zh_CN.UTF-8", "zh"),
        ("en", "zh", "en"),
        ("ZH-cn", None, "zh"),
    ],
)
def test_flag_beats_variable_beats_english(monkeypatch, option, variable, language):
    monkeypatch.delenv(VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(VARIABLE, variable)
    assert chosen_language(option) == language


@pytest.mark.parametrize(
    ("option", "variable", "source"), [("fr", "zh", "--lang"), ("", "", "--lang"), (None, "x", VARIABLE)]
)
def test_another_language_is_an_error_that_names_its_source(monkeypatch, option, variable, source):
    monkeypatch.setenv(VARIABLE, variable)
    with pytest.raises(ConfigError, match=f"^{source} .*en .*zh"):
        chosen_language(option)


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "step", "0 steps"),
        (1, "step", "1 step"),
        (1234, "step", "1,234 steps"),
        (2, "micro-batch", "2 micro-batches"),
    ],
)
def test_a_noun_follows_its_number(number, noun, text):
    assert plural(number, noun) == text
    assert fill("{number:# " + noun + "} here", number=number) == f"{text} here"


def test_a_text_is_filled_with_the_word_that_fits_the_number():
    text = "{count:,} of {all:# example} {count:is|are} used: {share:.0f}%, {text}"
    assert fill(text, count=1, all=1, share=99.6, text="{a}") == "1 of 1 example is used: 100%, {a}"
    assert fill(text, count=0, all=2000, share=0.0, text="") == "0 of 2,000 examples are used: 0%, "
