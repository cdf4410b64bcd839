"""A corpus of any size from real conversations: resampled, no two alike, in the form that each system reads best."""

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_recipe.data.formats import read_conversations
from sft_recipe.data.messages import Conversation

SENTENCE_END = re.compile(r"(?<=[.!?。！？\n])")
SHARE_OF_OTHERS = 1 / 3  # of an answer's sentences come from other answers of the same file

Turns = list[dict[str, str]]


def write_corpora(files: list[Path], sizes: list[int], folder: Path, seed: int = 0) -> None:
    """For each size N: N.messages.jsonl, N.completion.jsonl, N.messages.parquet; the smaller begin the larger."""
    corpus = list(resample(files, max(sizes), seed))
    for size in sizes:
        messages = [{"messages": turns} for turns in corpus[:size]]
        _write_lines(folder / f"{size}.messages.jsonl", messages)
        pq.write_table(pa.Table.from_pylist(messages), folder / f"{size}.messages.parquet")
        completions = ({"prompt": turns[:-1], "completion": turns[-1:]} for turns in corpus[:size])
        _write_lines(folder / f"{size}.completion.jsonl", completions)


def resample(files: list[Path], count: int, seed: int = 0) -> Iterator[Turns]:
    """Conversations drawn from the files, each answer's sentences shuffled and a third of them exchanged for others'.

    Each carries its number, so that none is another's copy even where there is little to draw from.
    """
    rng = random.Random(seed)
    pools = [[turns for conversation in read_conversations(path) if (turns := _turns(conversation))] for path in files]
    others = [[part for turns in pool for turn in turns if _answers(turn) for part in _parts(turn)] for pool in pools]
    drawn = [(turns, others[number]) for number, pool in enumerate(pools) for turns in pool]
    for number in range(1, count + 1):
        turns, parts = rng.choice(drawn)
        varied = [_shuffled(turn, parts, rng) if _answers(turn) else dict(turn) for turn in turns]
        asked = next(turn for turn in varied if turn["role"] == "user")
        asked["content"] += f"\n\n(No. {number})"
        yield varied


def _turns(conversation: Conversation) -> Turns:
    """Plain text that is asked and answered, through the last answer; nothing where it holds more than that."""
    turns = [{"role": turn.role, "content": turn.content} for turn in conversation.messages]
    while turns and not _answers(turns[-1]):
        turns.pop()
    plain = all(turn["role"] in ("system", "user", "assistant") and turn["content"] for turn in turns)
    return turns if plain and any(turn["role"] == "user" for turn in turns) else []


def _answers(turn: dict[str, str]) -> bool:
    return turn["role"] == "assistant"


def _parts(turn: dict[str, str]) -> list[str]:
    """Its sentences and lines, each with what ends it."""
    return [part for part in SENTENCE_END.split(turn["content"]) if part.strip()]


def _shuffled(turn: dict[str, str], others: list[str], rng: random.Random) -> dict[str, str]:
    parts = [rng.choice(others) if rng.random() < SHARE_OF_OTHERS else part for part in _parts(turn)]
    rng.shuffle(parts)
    return turn | {"content": "".join(parts).strip()}


def _write_lines(path: Path, records: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
