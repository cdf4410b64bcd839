"""Scores of answers against references: BLEU-4, ROUGE-L, exact match, and whether tool calls are the same."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CHINESE = "\u4e00", "\u9fff"  # CJK Unified Ideographs
CHINESE_SHARE = 0.3  # of the letters of all references, from which BLEU counts Chinese characters as words


@dataclass(frozen=True)
class Scores:
    """Scores over all answers, an empty one counting 0; `tool_match` is None where no reference calls a tool.

    `bleu4` is sacrebleu's, 0 to 100, of the whole corpus; `signature` says how it was computed. The others are means
    from 0 to 1.
    """

    bleu4: float
    rouge_l: float
    exact_match: float
    tool_match: float | None
    signature: str


def score(answers: Sequence[str], references: Sequence[str]) -> Scores:
    """Compare answers with references, one for each, at least one."""
    from sacrebleu.metrics import BLEU

    tokenizer = "zh" if _chinese_share(references) >= CHINESE_SHARE else "13a"
    bleu = BLEU(tokenize=tokenizer)
    corpus = bleu.corpus_score(list(answers), [list(references)])
    tokenize = BLEU(tokenize=tokenizer).tokenizer
    pairs = list(zip(answers, references, strict=True))
    rouge = [_rouge_l(tokenize(answer).split(), tokenize(reference).split()) for answer, reference in pairs]
    calls = [(tool_calls(answer), expected) for answer, reference in pairs if (expected := tool_calls(reference))]
    return Scores(
        bleu4=corpus.score,
        rouge_l=sum(rouge) / len(rouge),
        exact_match=sum(answer.strip() == reference.strip() for answer, reference in pairs) / len(pairs),
        tool_match=sum(found == expected for found, expected in calls) / len(calls) if calls else None,
        signature=str(bleu.get_signature()),
    )


def tool_calls(text: str) -> list[tuple[str, Any]]:
    """Return name and arguments of each call in a text; see `find_tool_calls`."""
    return [call for _, call in find_tool_calls(text)]


def find_tool_calls(text: str) -> list[tuple[int, tuple[str, Any]]]:
    """Return place, name and arguments of each call: JSON objects with `name` and `arguments` or `parameters`.

    Templates put them between markers of their own. Arguments that are JSON in a string are read.
    """
    calls, decoder, place = [], json.JSONDecoder(), text.find("{")
    while place >= 0:
        try:
            value, length = decoder.raw_decode(text[place:])
        except (ValueError, RecursionError):
            value, length = None, 1
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            arguments = value.get("arguments", value.get("parameters"))
            if arguments is not None:
                calls.append((place, (value["name"], _parsed(arguments))))
        place = text.find("{", place + length)
    return calls


def _parsed(arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
    return arguments


def _rouge_l(answer: list[str], reference: list[str]) -> float:
    """The F1 of the longest common subsequence of tokens (Lin 2004, https://aclanthology.org/W04-1013, section 3)."""
    common = _common_subsequence(answer, reference)
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def _common_subsequence(left: list[str], right: list[str]) -> int:
    lengths = [0] * (len(right) + 1)
    for token in left:
        diagonal = 0
        for place, other in enumerate(right, 1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if token == other else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]


def _chinese_share(texts: Sequence[str]) -> float:
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return sum(CHINESE[0] <= letter <= CHINESE[1] for letter in letters) / max(1, len(letters))
