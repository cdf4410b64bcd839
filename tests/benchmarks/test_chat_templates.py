"""The matrix of chat templates: small templates of the tests are exact, and the oracle notices wrong masks."""

import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest

from benchmarks.templates.judge import EXACT, NO_END, NOT_LOCATED, OMITTED, REFUSED, WRONG, judge
from benchmarks.templates.oracle import Oracle
from benchmarks.templates.page import page
from benchmarks.templates.shapes import SHAPES, build
from benchmarks.templates.sources import _jinja_files
from benchmarks.templates.vocabulary import build_tokenizer
from sft_recipe.data.rendering.renderer import Renderer
from tests.data.rendering.templates import CHATML, MARKS, STYLES
from tests.support.runs import ROOT

PLAIN = CHATML.translate(MARKS)


@pytest.mark.parametrize("name", STYLES)
def test_no_outcome_of_a_template_of_the_tests_is_wrong(name):
    outcomes = judge(STYLES[name].plain())
    assert {shape: outcome for shape, outcome in outcomes.items() if outcome.kind == WRONG} == {}
    assert [outcomes[shape].kind for shape in ("one turn", "two turns", "turn without loss")] == [EXACT] * 3


def test_outcomes_are_classified():
    kinds = {shape: outcome.kind for shape, outcome in judge(PLAIN).items()}
    omitted = {"tools", "tool call", "parallel calls", "tool call, named in its id", "tool result last", "reasoning"}
    assert kinds == {shape: OMITTED if shape in omitted else EXACT for shape in SHAPES}
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('No system turn.') }}{% endif %}" + PLAIN
    assert judge(strict)["system"].kind == REFUSED
    assert judge(PLAIN.replace("<|im_end|>", ""))["one turn"].kind == NO_END
    assert judge(PLAIN.replace("<|im_start|>assistant", "<|im_start|>bot"))["one turn"].kind == NOT_LOCATED


@pytest.mark.parametrize("shape", ["two turns", "inline reasoning", "special text", "assistant twice"])
def test_the_oracle_notices_each_wrong_token(shape):
    tokenizer = build_tokenizer(PLAIN)
    oracle = Oracle(tokenizer, build(shape, tokenizer.eos_token))
    encoded = Renderer(tokenizer).encode(oracle.chat.conversation())
    assert oracle.problems(encoded) == []
    mask, letters = encoded.loss_mask, "".join(chr(number) for number in range(97, 123))
    for index, number in enumerate(encoded.input_ids):
        token = tokenizer.convert_ids_to_tokens(number)
        at_edge = mask[index - 1 : index + 2] != [mask[index]] * 3
        if token == "<|im_end|>" or (token.strip("Ġ")[1:] and set(token.strip("Ġ")) <= set(letters) and not at_edge):
            wrong = replace(encoded, loss_mask=[*mask[:index], 1 - mask[index], *mask[index + 1 :]])
            assert oracle.problems(wrong), (index, token)


def test_other_ids_are_noticed():
    tokenizer = build_tokenizer(PLAIN)
    oracle = Oracle(tokenizer, build("one turn", tokenizer.eos_token))
    encoded = Renderer(tokenizer).encode(oracle.chat.conversation())
    other = replace(encoded, input_ids=[*encoded.input_ids, 5], loss_mask=[*encoded.loss_mask, 0])
    assert oracle.problems(other) == ["the text is not that of transformers"]


def test_the_page_counts_outcomes_and_names_templates():
    text = page({"a/plain": judge(PLAIN), "b/strict": judge(PLAIN.replace("<|im_start|>assistant", "<|im_start|>bot"))})
    assert "| one turn | 1 | 0 | 0 | 0 | 1 | 0 |" in text
    assert "## Wrong\n\nNone." in text and "b/strict" in text


def test_templates_are_read_from_wheels(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("package/templates/Some-Model.jinja", PLAIN)
        wheel.writestr("package/code.py", "")
    assert list(_jinja_files(tmp_path / "a.whl")) == [("Some-Model", PLAIN)]


def test_help_imports_no_library():
    script = "import sys; from benchmarks.chat_templates import main; sys.argv[1:] = ['--help']; sys.exit(main())"
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "torch" not in shown.stderr and "transformers" not in shown.stderr
    for flag in ("--cache", "--only", "--workers"):
        line = next(line for line in shown.stdout.splitlines() if line.strip().startswith(flag))
        assert len(line.split()) > 3, f"{flag} is not described"
