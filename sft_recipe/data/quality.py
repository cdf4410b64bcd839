"""Finds records of doubtful quality: near-duplicates, benchmark questions, answers that break off or repeat."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from datasketch import MinHash, MinHashLSH

from sft_recipe.data.messages import Conversation
from sft_recipe.data.readers import READERS, BadRecord, read_records, suffix_of
from sft_recipe.errors import DataError

KINDS = ("near_duplicates", "contaminated", "truncated", "repeated")
SIMILARITY = 0.8  # of the shingles of two near-duplicates, the fraction that both have
SHINGLE = 3  # words of a shingle
PERMUTATIONS = 128
# A question is in a record if so many words of it are there in a row, as in the report on GPT-3, or all of them.
QUESTION_WORDS, SHORTEST_QUESTION = 13, 6
QUESTION_FIELDS = ("question", "prompt", "problem", "instruction", "query", "text", "input")
# An answer breaks off if it has so many characters and ends inside a word, after a comma, or in a block of code.
LONG_ANSWER = 200
BREAKS_OFF = re.compile(r"[\w,]$")
# An answer repeats itself if more than half of its runs of words have occurred in it before.
RUN_WORDS, SHORTEST_REPETITION = 5, 60
WORD = re.compile(r"[぀-ヿ㐀-鿿가-힯]|[^\W぀-ヿ㐀-鿿가-힯]+")  # a CJK character is a word
SHOWN = 3


@dataclass(frozen=True)
class Problem:
    """Says what is doubtful about a record: one of KINDS, and in words what it is like or how it ends."""

    kind: str
    reason: str


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case; each Chinese, Japanese or Korean character is one."""
    return WORD.findall(text.lower())


def shingles_of(conversation: Conversation) -> set[str]:
    """Return the runs of SHINGLE words in the user's and the assistant's texts; a shorter text is one."""
    texts = [m.content for m in conversation.messages if m.role in ("user", "assistant")]
    words = words_of("\n".join(texts))
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


class QualityChecks:
    """Checks records one after another; a near-duplicate is like a record that was checked before it.

    `questions` are those of benchmarks. Keeps about 2 KB of each record.
    """

    def __init__(self, questions: Sequence[str] = ()):
        self._index = MinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS)
        self._empty = MinHash(num_perm=PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest)
        self._signatures: dict[int, tuple[str, MinHash]] = {}
        self._questions = {run: question for question in questions for run in _runs_of(question)}
        self._lengths = sorted({len(run) for run in self._questions})

    @property
    def has_questions(self) -> bool:
        """Return whether there is a question of a benchmark to look for."""
        return bool(self._questions)

    def check(
        self, conversation: Conversation, is_kept: Callable[[list[Problem]], bool] | None = None
    ) -> list[Problem]:
        """Return what is doubtful about a record. Later ones are compared with it, unless `is_kept` returns False."""
        problems = [problem for problem in self._problems(conversation) if problem]
        signature = self._empty.copy()
        signature.update_batch([shingle.encode() for shingle in shingles_of(conversation)])
        if like := self._nearest(signature):
            problems.insert(0, Problem("near_duplicates", f"like {like}"))
        if is_kept is None or is_kept(problems):
            number = len(self._signatures)
            self._signatures[number] = conversation.source, signature
            self._index.insert(number, signature, check_duplication=False)
        return problems

    def _nearest(self, signature: MinHash) -> str:
        """Where the first record was read that is similar enough, "" if there is none."""
        for number in sorted(self._index.query(signature)):
            source, other = self._signatures[number]
            if signature.jaccard(other) >= SIMILARITY:
                return source
        return ""

    def _problems(self, conversation: Conversation) -> Iterator[Problem | None]:
        texts = [m.content for m in conversation.messages if m.role in ("user", "assistant")]
        yield self._question(texts)
        answers = [m.content for m in conversation.messages if m.role == "assistant" and m.train and not m.tool_calls]
        yield next((Problem("truncated", f"ends {answer[-40:]!r}") for answer in answers if breaks_off(answer)), None)
        repeated = (Problem("repeated", f"{run!r} again and again") for run in map(repetition, answers) if run)
        yield next(repeated, None)

    def _question(self, texts: list[str]) -> Problem | None:
        for text in texts if self._questions else ():
            words = words_of(text)
            for size in self._lengths:
                for start in range(len(words) - size + 1):
                    if question := self._questions.get(tuple(words[start : start + size])):
                        return Problem("contaminated", f"has the benchmark question {question[:80]!r}")
        return None


def _runs_of(question: str) -> Iterator[tuple[str, ...]]:
    words = words_of(question)
    if len(words) >= SHORTEST_QUESTION:
        for start in range(max(1, len(words) - QUESTION_WORDS + 1)):
            yield tuple(words[start : start + QUESTION_WORDS])


def breaks_off(answer: str) -> bool:
    """Return whether an answer seems to end too early: inside a sentence after many characters, or in a code block."""
    text = answer.rstrip()
    in_code = len(re.findall(r"^\s*```", text, re.MULTILINE)) % 2 == 1
    return in_code or (len(text) >= LONG_ANSWER and BREAKS_OFF.search(text) is not None)


def repetition(answer: str) -> str:
    """Return the most frequent run of words of an answer that repeats itself, "" for others."""
    words = words_of(answer)
    if len(words) < SHORTEST_REPETITION:
        return ""
    runs = Counter(tuple(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1))
    return " ".join(runs.most_common(1)[0][0]) if len(runs) < sum(runs.values()) / 2 else ""


def read_questions(path: Path) -> list[str]:
    """Return the questions of a file: the lines of a .txt file, or one field of each record of a data file.

    Raises DataError for a file that cannot be read, or whose records have no field for a question.
    """
    if suffix_of(path) not in READERS:
        try:
            return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return [_question_of(record, location) for location, record in read_records(path)]


def _question_of(record: Any, location: str) -> str:
    if isinstance(record, BadRecord):
        raise record.error
    fields = record if isinstance(record, dict) else {"question": record}
    found = next((fields[name] for name in QUESTION_FIELDS if isinstance(fields.get(name), str)), None)
    if found is None:
        raise DataError(f"{location}: no question; expected one of {', '.join(QUESTION_FIELDS)}")
    return found


@dataclass
class QualityReport:
    """Counts problems by kind, with the first ones in words."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    kinds: Sequence[str] = ()

    def add(self, source: str, problems: Sequence[Problem]) -> None:
        """Count the problems of a record."""
        for problem in problems:
            self.counts[problem.kind] += 1
            shown = self.examples.setdefault(problem.kind, [])
            if len(shown) < SHOWN:
                shown.append(f"{source} {problem.reason}")

    def sentences(self) -> Iterator[str]:
        """Yield a sentence without a final period for each kind of problem that occurs; one that says that none does.

        Nothing where no kind was looked for.
        """
        if self.kinds and not self.counts:
            yield f"quality: none found (looked for: {', '.join(self.kinds).replace('_', ' ')})"
        for kind, count in self.counts.items():
            more = "; ..." if count > len(self.examples[kind]) else ""
            yield f"{kind.replace('_', ' ')}: {count:,} ({'; '.join(self.examples[kind])}{more})"
