"""What becomes of each shape of conversation in one chat template."""

import re
from dataclasses import dataclass

from benchmarks.templates.oracle import Oracle
from benchmarks.templates.shapes import SHAPES, build
from benchmarks.templates.vocabulary import build_tokenizer
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.errors import DataError, ModelError

EXACT, REFUSED, OMITTED, NO_END, NOT_LOCATED, WRONG = KINDS = (
    "exact",
    "refused by the template",
    "omitted by the template",
    "no end token",
    "not located",
    "wrong",
)


@dataclass(frozen=True)
class Outcome:
    """Says what became of a conversation: one of KINDS, and the reason in words."""

    kind: str
    reason: str = ""


def judge(source: str) -> dict[str, Outcome]:
    """Return the outcome of each shape in the chat template with this source."""
    tokenizer = build_tokenizer(source)
    rendered = [text for shape in SHAPES for text in Oracle(tokenizer, build(shape, "")).references]
    tokenizer = build_tokenizer(source, "".join(rendered))  # some put their markers together from pieces
    tokenizer.name_or_path = "TEMPLATE"
    try:
        renderer = Renderer(tokenizer)
    except ModelError as error:
        return dict.fromkeys(SHAPES, Outcome(REFUSED, _reason(error)))
    return {shape: _outcome(renderer, Oracle(tokenizer, build(shape, tokenizer.eos_token))) for shape in SHAPES}


def _outcome(renderer: Renderer, oracle: Oracle) -> Outcome:
    try:
        problems = oracle.problems(renderer.encode(oracle.chat.conversation()))
    except ModelError as error:
        return Outcome(NO_END, _reason(error))
    except DataError as error:
        return _refusal(_reason(error), oracle)
    return Outcome(WRONG, "; ".join(problems)) if problems else Outcome(EXACT)


def _refusal(reason: str, oracle: Oracle) -> Outcome:
    """The outcome of a refusal; a reason that transformers' rendering contradicts is wrong."""
    if reason.startswith("refuses the conversation"):
        return Outcome(WRONG if any(map(oracle.is_complete, oracle.references)) else REFUSED, reason)
    if reason.startswith("omits "):
        return Outcome(OMITTED if oracle.is_missing(reason) else WRONG, reason)
    return Outcome(NOT_LOCATED, reason)


def _reason(error: Exception) -> str:
    """The message without the names of source and template, and without the advice."""
    text = re.sub(r"^.*?the chat template (of TEMPLATE )?|^TEMPLATE: ", "", str(error), count=1)
    return re.split(
        r", so the tokens to train on|; (?:set data\.\w+=true, )?remove it from|; data\.\w+=true|, so the model would",
        text,
    )[0]
