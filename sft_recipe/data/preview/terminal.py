"""Prints a preview to the terminal; without color, brackets mark the supervised text."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.text import Text

from sft_recipe.data.preview.stats import DatasetStats, Example, Settings, roles_of
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.data.sources import SourceCounts
from sft_recipe.display import CONTROL, control_symbol, printable
from sft_recipe.language import plural

OPEN, CLOSE = "⟦", "⟧"  # rare in texts, unlike [[ ]]
STYLES = {  # (supervised, special)
    (True, False): "green",
    (True, True): "bold reverse green",
    (False, False): "dim",
    (False, True): "magenta",
}
# Spaces that are easy to overlook: at the ends of a line and of a run of tokens of one kind.
EDGE_SPACES = re.compile(r"^ +| +$| +(?=\n)")
PIECE = re.compile(f"\n|·+|{CONTROL.pattern}")


@dataclass(frozen=True)
class Token:
    """A token and its text; tokens that share one character are combined."""

    ids: list[int]
    text: str
    is_special: bool
    is_supervised: bool

    @property
    def kind(self) -> tuple[bool, bool]:
        """Return (is supervised, is special): the key of its style."""
        return self.is_supervised, self.is_special


@dataclass(frozen=True)
class Part:
    """A part of a token's text to display; a mark is a symbol for white space or for a control character."""

    text: str
    is_mark: bool = False


def tokens_of(example: Example, renderer: Renderer, limit: int) -> list[Token]:
    """Return the first `limit` tokens of an example, each with the text that it adds to the decoded conversation."""
    ids = example.encoded.input_ids[:limit]
    decode = renderer.tokenizer.backend_tokenizer.decode
    # Each token is decoded together with the previous one, ids[previous:start]: decoded alone some lose a space.
    tokens, previous, start = [], 0, 0
    for stop in range(1, len(ids) + 1):
        is_special = ids[stop - 1] in renderer.special_ids
        known = decode(ids[previous:start], skip_special_tokens=False)
        text = decode(ids[previous:stop], skip_special_tokens=False)[len(known) :]
        next_is_special = stop == len(ids) or ids[stop] in renderer.special_ids
        if text.endswith("\ufffd") and not is_special and not next_is_special:
            continue  # part of a character
        tokens.append(Token(ids[start:stop], text, is_special, bool(example.encoded.loss_mask[stop - 1])))
        previous, start = start, stop
    return tokens


def visible(tokens: list[Token]) -> Iterator[tuple[Token, list[Part]]]:
    """Yield tokens with visible white space and control characters: `⏎` newline, `·` space at an edge, `␛` escape."""
    for _, group in groupby(tokens, key=lambda token: token.kind):
        run = list(group)
        text = EDGE_SPACES.sub(lambda match: "·" * len(match[0]), "".join(token.text for token in run))
        start = 0
        for token in run:
            yield token, _parts(text[start : start + len(token.text)], token.text)
            start += len(token.text)


def counts_line(example: Example, settings: Settings) -> str:
    """Describe an example: tokens, supervised tokens, turns and, if it is too long, the consequence."""
    roles = roles_of(example.record)
    percent = 100 * example.supervised / example.tokens
    turns = f"{plural(len(roles), 'turn')}: {pattern(roles)}" if example.record.messages else "not rendered"
    size = plural(example.tokens, "token")
    size += f" of {plural(example.characters, 'character')}" if example.characters else ""
    line = f"{size}, loss on {example.supervised:,} ({percent:.0f}%), {turns}"
    if settings.max_target_length is not None:
        source = example.encoded.source_length
        answer = plural(example.tokens - source, "token")
        line = f"source {plural(source, 'token')}, answer {answer} (loss on all of them), {turns}"
    return f"{line}; {problem}" if (problem := too_long(example, settings)) else line


def too_long(example: Example, settings: Settings) -> str:
    """Describe the consequence for an example that is longer than the limits, "" for others."""
    over = exceeded(example, settings)
    effects = {
        "drop": "the record is left out",
        "right": f"cut off at the end: {' and '.join(plural(count, 'token') for count in over.values())}",
        "error": "training stops",
    }
    return f"longer than {' and '.join(over)}: {effects[settings.truncation]}" if over else ""


def exceeded(example: Example, settings: Settings) -> dict[str, int]:
    """Return by how many tokens an example is longer than MAX_LENGTH, or its answer than MAX_TARGET_LENGTH."""
    sides = {f"MAX_LENGTH {settings.max_length:,}": example.tokens - settings.max_length}
    if settings.max_target_length is not None:
        source = example.encoded.source_length
        answer = example.tokens - source
        sides = {
            f"MAX_LENGTH {settings.max_length:,} (source)": source - settings.max_length,
            f"MAX_TARGET_LENGTH {settings.max_target_length:,} (answer)": answer - settings.max_target_length,
        }
    return {name: over for name, over in sides.items() if over > 0}


def more_tokens(example: Example, limit: int) -> str:
    """Return the number of tokens after the limit, which are not displayed, or "" if there are none."""
    return plural(example.tokens - limit, "more token") if example.tokens > limit else ""


def pattern(roles: list[str] | tuple[str, ...]) -> str:
    """Return the roles of a conversation with repetitions combined: `system, (user, assistant) x 3`."""
    return ", ".join(f"({', '.join(cycle)}) x {times}" if times > 1 else cycle[0] for cycle, times in cycles(roles))


def cycles(roles: list[str] | tuple[str, ...]) -> Iterator[tuple[list[str], int]]:
    """Yield the roles as (cycle, repetitions); roles that do not repeat are cycles of length 1."""
    start = 0
    while start < len(roles):
        best, times = [roles[start]], 1
        for size in (1, 2, 3, 4):
            cycle, count = list(roles[start : start + size]), 1
            while list(roles[start + count * size : start + (count + 1) * size]) == cycle:
                count += 1
            if count > 1 and count * size > len(best) * times:
                best, times = cycle, count
        yield best, times
        start += len(best) * times


def summary(stats: DatasetStats) -> list[str]:
    """Return the statistics of all records in a few lines."""
    lengths = stats.lengths
    tokens, supervised = int(lengths.sum()), int(stats.supervised.sum())
    repeats, _ = stats.duplicates()
    duplicates = plural(repeats, "exact duplicate") if repeats else "no duplicates"
    median, p95 = np.percentile(lengths, [50, 95], method="lower")
    return [
        f"{plural(len(lengths), 'record')}, {tokens:,} tokens, "
        f"loss on {supervised:,} tokens ({100 * supervised / tokens:.1f}%), {duplicates}",
        f"lengths: median {median:,}, p95 {p95:,}, max {lengths.max():,} tokens; {_truncated(stats)}",
        *_characters(stats),
        _batches(stats),
        *_warnings(stats),
    ]


def _characters(stats: DatasetStats) -> Iterator[str]:
    if total := int(stats.characters.sum()):
        median, p95, longest = np.percentile(stats.characters, [50, 95, 100], method="lower")
        yield (
            f"texts: median {median:,}, p95 {p95:,}, max {longest:,} characters; "
            f"{total / int(stats.lengths.sum()):.2f} characters a token"
        )


def _batches(stats: DatasetStats) -> str:
    packing = stats.packing()
    parts = f"in {plural(packing.steps, 'step')} and {plural(packing.micro_batches, 'micro-batch')}"
    if stats.settings.max_target_length is not None:
        return (
            f"batches: {packing.packed:,} tokens per epoch, {packing.padded:,} with padding "
            f"({packing.saved:.0%} of them padding), {parts}; the last answer of each record is its target"
        )
    return (
        f"packing: {packing.packed:,} tokens per epoch instead of {packing.padded:,} padded "
        f"({packing.saved:.0%} saved), {parts}; no cross-document attention"
    )


def _truncated(stats: DatasetStats) -> str:
    truncation, limit = stats.truncation(), f"MAX_LENGTH {stats.settings.max_length:,}"
    if stats.settings.max_target_length is not None:
        limit = f"{limit} (source) or MAX_TARGET_LENGTH {stats.settings.max_target_length:,} (answer)"
    if not truncation.records:
        return f"none is longer than {limit}"
    effect = {"drop": "left out", "right": "truncated", "error": "training stops"}[stats.settings.truncation]
    lost = f"{plural(truncation.tokens, 'token')} lost, {truncation.supervised:,} of them supervised"
    return f"{plural(truncation.records, 'record')} longer than {limit}: {effect} ({lost})"


def _warnings(stats: DatasetStats) -> Iterator[str]:
    truncation = stats.truncation()
    if truncation.without_target:
        yield f"{plural(truncation.without_target, 'record')} left out: no supervised token remains"
    if stats.continued:
        conversations = plural(len(stats.lengths) - stats.continued, "conversation")
        yield (
            f"data.split_turns: one record for each assistant turn of {conversations}; about "
            f"{plural(stats.repeated_tokens, 'token')} of earlier turns, repeated as context"
        )
    if mix := mixture_text(truncation.sources):
        yield f"an epoch contains {mix}"
    if stats.special_text:
        yield f"{plural(stats.special_text, 'record')} with text that spells a special token; it stays text"
    if stats.dropped_reasoning:
        records = plural(stats.dropped_reasoning, "record")
        yield f"{records} with reasoning in the last turn that the chat template drops; it is not trained on"
    if stats.earlier_without_reasoning:
        answers = plural(stats.earlier_without_reasoning, "answer")
        yield (
            f"{answers} before the last user turn without the reasoning, which the chat template drops there; "
            "data.split_turns=true makes an example of each answer, with its reasoning"
        )
    if stats.joined_starts:
        answers = plural(stats.joined_starts, "answer")
        yield (
            f"{answers} whose first token also has the end of the prompt in it, such as a space: it is not trained on, "
            "and at inference the prompt is tokenized differently; use a chat template whose generation prompt does "
            "not end in a space"
        )
    yield from map(printable, stats.remarks.sentences())
    yield from map(printable, stats.quality.sentences())
    if stats.rejected:
        effect = {"error": "training stops", "skip": "left out"}[stats.settings.on_bad_record]
        yield f"{plural(stats.rejected, 'record')} rejected ({rejected_kinds(stats)}): {effect}; first error:"
        yield f"  {printable(stats.reasons[0])}"


def mixture_text(sources: list[SourceCounts]) -> str:
    """Describe what an epoch contains of each source, as `50 of 100 from a.json`; "" if it contains everything."""
    if all(source.target_count == source.examples for source in sources):
        return ""
    return ", ".join(
        f"{source.target_count:,} of {source.examples:,} from {printable(source.name)}" for source in sources
    )


def rejected_kinds(stats: DatasetStats) -> str:
    """Return the number of rejected records by kind: `3 empty, 1 roles`."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(stats.error_kinds.items()))


def print_preview(stats: DatasetStats, renderer: Renderer, console: Console) -> None:
    """Print the sample and the summary."""
    in_color = console.color_system is not None and not console.no_color
    settings = stats.settings
    if stats.selection.find:
        records = plural(stats.found, "conversation")
        console.print(Text(f"{records} with {printable(stats.selection.find)!r}, {len(stats.sample):,} shown"))
    if stats.sample:
        console.print(legend(in_color, settings), soft_wrap=True)
    for number, example in enumerate(stats.sample, 1):
        console.print()
        title = Text(f"{number} of {len(stats.sample)}: {printable(example.record.source)}")
        console.rule(title, align="left", style="dim", characters="─" if in_color else "-")
        text = text_of(tokens_of(example, renderer, settings.longest), in_color)
        if more := more_tokens(example, settings.longest):
            text.append(f"✂ {more}", style="red")
        console.print(text, soft_wrap=True, end="" if text.plain.endswith("\n") else "\n")
        console.print(Text(counts_line(example, settings), style="bold"), soft_wrap=True)
    if stats.sample:
        console.print()
        console.rule(style="dim", characters="─" if in_color else "-")
    for line in summary(stats):
        console.print(Text(line), soft_wrap=True)


def legend(in_color: bool, settings: Settings) -> Text:
    """Explain the colors or the brackets."""
    names = "supervised", "context (no loss)"
    if settings.max_target_length is not None:
        names = "answer (the decoder's target)", "source (for the encoder, no loss)"
    if not in_color:
        return Text(f"{OPEN}{names[0]}{CLOSE} {names[1]}")
    words = [(names[0], (True, False)), ("end of turn", (True, True)), (names[1], (False, False))]
    words.append(("special token", (False, True)))
    return Text("  ").join(Text(word, style=STYLES[kind]) for word, kind in words)


def text_of(tokens: list[Token], in_color: bool) -> Text:
    """Return the tokens of a conversation, colored, or with brackets around supervised text."""
    text = Text()
    for is_supervised, run in groupby(visible(tokens), key=lambda item: item[0].is_supervised):
        text.append(OPEN if is_supervised and not in_color else "")
        for token, parts in run:
            for part in parts:
                style = STYLES[token.kind]
                text.append(part.text, style=f"{style} dim" if part.is_mark and "dim" not in style else style)
        text.append(CLOSE if is_supervised and not in_color else "")
    return text


def _parts(shown: str, original: str) -> list[Part]:
    parts, start = [], 0
    for match in PIECE.finditer(shown):
        if match[0][0] == "·" and match[0] == original[match.start() : match.end()]:
            continue  # the dots are in the data
        if match.start() > start:
            parts.append(Part(shown[start : match.start()]))
        if match[0] == "\n":
            parts += [Part("⏎", is_mark=True), Part("\n")]
        else:
            parts.append(Part(match[0] if match[0][0] == "·" else control_symbol(match[0]), is_mark=True))
        start = match.end()
    return [*parts, Part(shown[start:])] if start < len(shown) else parts
