"""Scores against sacrebleu's own command line and arithmetic by hand."""

import subprocess
import sys

import pytest

from sft_recipe.evaluation.scores import score, tool_calls

ENGLISH = [
    ("The cat sat on the mat and looked at the dog.", "The cat sat on the mat and looked at the bird."),
    ("It's 3.5 km, isn't it?", "It is 3.5 km, isn't it?"),
    ("", "Nothing was said here at all."),
]
CHINESE = [
    ("今天天气很好，我们去公园。", "今天天气很好，我们去公园吧。"),
    ("机器学习是人工智能的一个分支。", "机器学习是人工智能的分支。"),
]


def command_line(pairs, tokenizer, folder):
    """What `sacrebleu` prints as the score of these answers."""
    for name, texts in zip(("answers", "references"), zip(*pairs, strict=True), strict=True):
        (folder / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", folder / "references", "-i", folder / "answers", "-tok", tokenizer]
    return float(subprocess.run([*command, "-b", "-w", "6"], check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("pairs, tokenizer", [(ENGLISH, "13a"), (CHINESE, "zh"), (ENGLISH[:1] + CHINESE, "zh")])
def test_bleu_is_that_of_the_sacrebleu_command(pairs, tokenizer, tmp_path):
    found = score(*zip(*pairs, strict=True))
    assert found.bleu4 == pytest.approx(command_line(pairs, tokenizer, tmp_path), abs=1e-5)
    assert f"tok:{tokenizer}" in found.signature and "version:" in found.signature


def test_identical_texts_have_the_best_scores_in_both_languages():
    for text in (ENGLISH[0][0], CHINESE[0][0]):
        found = score([text], [text])
        assert (found.bleu4, found.rouge_l, found.exact_match) == (pytest.approx(100.0), 1.0, 1.0)


def test_rouge_l_by_hand():
    """Common subsequence "the cat on mat": 4 of 5 and of 6 tokens; F1 = 2 * 4 / (5 + 6)."""
    found = score(["the cat on a mat"], ["the big cat lay on mat"])
    assert found.rouge_l == pytest.approx(2 * 4 / 11)


def test_empty_answers_count_0_and_are_not_skipped():
    answer, reference = CHINESE[0]
    alone, with_empty = score([reference], [reference]), score([reference, ""], [reference, reference])
    assert with_empty.rouge_l == alone.rouge_l / 2 and with_empty.exact_match == 0.5
    assert with_empty.bleu4 < alone.bleu4
    assert score([""], ["word"]).bleu4 == 0


def test_unrelated_sentences_score_about_nothing():
    assert score(["Bananas grow in warm places."], ["Our meeting starts at nine o'clock."]).bleu4 < 10


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'


@pytest.mark.parametrize(
    "text, calls",
    [
        (CALL, [("weather", {"city": "Paris", "days": 2})]),
        ('{"name": "f", "parameters": {}}', [("f", {})]),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', [("f", {"a": 1})]),
        (f"First. {CALL} {CALL}", [("weather", {"city": "Paris", "days": 2})] * 2),
        ('{"a": {"name": "inner", "arguments": {}}}', []),
        ("{ {not json} a set {1, 2}", []),
        ('{"name": "no arguments"}', []),
    ],
)
def test_tool_calls_are_found_in_text(text, calls):
    assert tool_calls(text) == calls


def test_tool_match_compares_names_and_arguments():
    other = CALL.replace("Paris", "Rome")
    reordered = '<tool_call>{"arguments": {"days": 2, "city": "Paris"}, "name": "weather"}</tool_call>'
    found = score([reordered, other, "no call", "text"], [CALL, CALL, CALL, "text"])
    assert found.tool_match == pytest.approx(1 / 3)
    assert score(["a"], ["a"]).tool_match is None
