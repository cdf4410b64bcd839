"""A preview for the terminal; in a pipe, where colours are lost, brackets mark what is supervised."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.text import Text

from sft_recipe.data.preview.stats import DatasetStats, Example, Settings, SourceCounts
from sft_recipe.data.rendering.renderer import Renderer

OPEN, CLOSE = "⟦", "⟧"  # rare in texts, unlike [[ ]]
STYLES = {  # (supervised, special)
    (True, False): "green",
    (True, True): "bold reverse green",
    (False, False): "dim",
    (False, True): "magenta",
}
# Spaces that are easily overlooked: at the ends of a line, and in front of or after what is of another kind.
EDGE_SPACES = re.compile(r"^ +| +$| +(?=\n)")
# What would act on a terminal, or change the order or be lost in what is read: shown, never sent.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff]")
PIECE = re.compile(f"\n|·+|{CONTROL.pattern}")


@dataclass(frozen=True)
class Token:
    """What a token shows; where several share a character, all of them together."""

    ids: list[int]
    text: str
    is_special: bool
    is_supervised: bool

    @property
    def kind(self) -> tuple[bool, bool]:
        return self.is_supervised, self.is_special


@dataclass(frozen=True)
class Part:
    """A stretch of one token's text to be shown; a mark stands for white space or a control character."""

    text: str
    is_mark: bool = False


def tokens_of(example: Example, renderer: Renderer, limit: int) -> list[Token]:
    """The first `limit` tokens with the text that each adds: whole characters, and spaces that a lone token loses."""
    ids = example.encoded.input_ids[:limit]
    decode = renderer.tokenizer.backend_tokenizer.decode
    tokens, before, start = [], 0, 0  # what stands in [before, start) was the token before, which decoding may look at
    for stop in range(1, len(ids) + 1):
        is_special = ids[stop - 1] in renderer.special_ids
        known = decode(ids[before:start], skip_special_tokens=False)
        text = decode(ids[before:stop], skip_special_tokens=False)[len(known) :]
        next_is_special = stop == len(ids) or ids[stop] in renderer.special_ids
        if text.endswith("\ufffd") and not is_special and not next_is_special:
            continue  # part of a character
        tokens.append(Token(ids[start:stop], text, is_special, bool(example.encoded.loss_mask[stop - 1])))
        before, start = start, stop
    return tokens


def visible(tokens: list[Token]) -> Iterator[tuple[Token, list[Part]]]:
    """Each token with its text made visible: `⏎` before a new line, `·` for spaces at edges, `␛` for an escape."""
    for _, group in groupby(tokens, key=lambda token: token.kind):
        run = list(group)
        text = EDGE_SPACES.sub(lambda match: "·" * len(match[0]), "".join(token.text for token in run))
        start = 0
        for token in run:
            yield token, _parts(text[start : start + len(token.text)], token.text)
            start += len(token.text)


def printable(text: str) -> str:
    """A text without anything that acts on a terminal."""
    return CONTROL.sub(lambda match: _control(match[0]), text)


def counts_line(example: Example, settings: Settings) -> str:
    """Tokens, supervised, share, turns, and what becomes of an example that is too long."""
    roles = [message.role for message in example.conversation.messages]
    share = 100 * example.supervised / example.tokens
    turns = f"{counted(len(roles), 'turn')}: {pattern(roles)}"
    line = f"{example.tokens:,} tokens, {example.supervised:,} supervised ({share:.0f}%), {turns}"
    return f"{line}; {too_long(example, settings)}" if example.tokens > settings.max_length else line


def too_long(example: Example, settings: Settings) -> str:
    """What becomes of an example that is longer than MAX_LENGTH."""
    over = example.tokens - settings.max_length
    becomes = {"drop": "the record is left out", "right": f"{over:,} tokens are cut", "error": "training stops"}
    return f"longer than MAX_LENGTH {settings.max_length:,}: {becomes[settings.truncation]}"


def more_tokens(example: Example, limit: int) -> str:
    """How many tokens there are past the limit, up to which an example is shown; nothing if there are none."""
    return counted(example.tokens - limit, "more token") if example.tokens > limit else ""


def pattern(roles: list[str] | tuple[str, ...]) -> str:
    """Roles in few words: `system, (user, assistant) x 3`."""
    return ", ".join(f"({', '.join(cycle)}) x {times}" if times > 1 else cycle[0] for cycle, times in cycles(roles))


def cycles(roles: list[str] | tuple[str, ...]) -> Iterator[tuple[list[str], int]]:
    """Roles as (cycle, times); what does not repeat comes one by one."""
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
    """The essentials of all records read in a few lines."""
    settings, lengths = stats.settings, stats.lengths
    repeats, _ = stats.duplicates()
    truncation, packing = stats.truncation(), stats.packing()
    tokens, supervised = int(lengths.sum()), int(stats.supervised.sum())
    duplicates = counted(repeats, "exact duplicate") if repeats else "no duplicates"
    middle, high = np.percentile(lengths, [50, 95], method="higher")
    limit = f"MAX_LENGTH {settings.max_length:,}"
    cut = f"nothing is longer than {limit}"
    if truncation.records:
        becomes = {"drop": "left out", "right": "cut", "error": "stopping training"}[settings.truncation]
        lost = f"{truncation.tokens:,} tokens, {truncation.supervised:,} of them supervised"
        cut = f"{counted(truncation.records, 'record')} longer than {limit}, {becomes} ({lost})"
    share = f"{100 * supervised / tokens:.1f}%"
    lines = [
        f"{counted(len(lengths), 'record')}, {tokens:,} tokens, {supervised:,} supervised ({share}), {duplicates}",
        f"lengths: median {middle:,}, 95% up to {high:,}, longest {lengths.max():,}; {cut}",
        f"packing: {packing.packed:,} tokens an epoch instead of {packing.padded:,} padded ({packing.saved:.0%} saved) "
        f"in {counted(packing.steps, 'step')}, {counted(packing.micro_batches, 'micro-batch')}",
    ]
    if truncation.without_target:
        lines.append(f"{counted(truncation.without_target, 'record')} left out, with no supervised token left")
    if mix := mixed(truncation.sources):
        lines.append(f"an epoch holds {mix}")
    if stats.special_text:
        lines.append(f"{counted(stats.special_text, 'record')} with text that spells a special token; it stays text")
    if stats.dropped_reasoning:
        lines.append(
            f"{counted(stats.dropped_reasoning, 'record')} with a thought in the last turn that the template hides"
        )
    if stats.rejected:
        becomes = {"error": "which stops training", "skip": "left out"}[settings.on_bad_record]
        lines.append(f"{counted(stats.rejected, 'record')} rejected ({kinds(stats)}), {becomes}; the first:")
        lines.append(f"  {printable(stats.reasons[0])}")
    return lines


def mixed(sources: list[SourceCounts]) -> str:
    """`50 of 100 from a.json`: what an epoch holds of each source, where that is not simply all."""
    if all(share.target_count == share.examples for share in sources):
        return ""
    return ", ".join(f"{share.target_count:,} of {share.examples:,} from {printable(share.name)}" for share in sources)


def kinds(stats: DatasetStats) -> str:
    """Rejected records by kind: `3 empty, 1 roles`."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(stats.kinds.items()))


def counted(number: int, what: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{number:,} {what if number == 1 else what + ('es' if what.endswith('ch') else 's')}"


def print_preview(stats: DatasetStats, renderer: Renderer, console: Console) -> None:
    """Print the sample and the summary."""
    in_colour = console.color_system is not None and not console.no_color
    settings = stats.settings
    if stats.sample:
        console.print(legend(in_colour), soft_wrap=True)
    for number, example in enumerate(stats.sample, 1):
        console.print()
        title = Text(f"{number} of {len(stats.sample)}: {printable(example.conversation.source)}")
        console.rule(title, align="left", style="dim", characters="─" if in_colour else "-")
        text = text_of(tokens_of(example, renderer, settings.max_length), in_colour)
        if more := more_tokens(example, settings.max_length):
            text.append(f"✂ {more}", style="red")
        console.print(text, soft_wrap=True, end="" if text.plain.endswith("\n") else "\n")
        console.print(Text(counts_line(example, settings), style="bold"), soft_wrap=True)
    if stats.sample:
        console.print()
        console.rule(style="dim", characters="─" if in_colour else "-")
    for line in summary(stats):
        console.print(Text(line), soft_wrap=True)


def legend(in_colour: bool) -> Text:
    """Says what the colours, or the brackets, mean."""
    if not in_colour:
        return Text(f"{OPEN}supervised{CLOSE} context")
    words = [("supervised", (True, False)), ("ends a turn", (True, True)), ("context", (False, False))]
    words.append(("special token", (False, True)))
    return Text("  ").join(Text(word, style=STYLES[kind]) for word, kind in words)


def text_of(tokens: list[Token], in_colour: bool) -> Text:
    """A conversation's tokens, coloured, or in brackets where they are supervised."""
    text = Text()
    for is_supervised, run in groupby(visible(tokens), key=lambda item: item[0].is_supervised):
        text.append(OPEN if is_supervised and not in_colour else "")
        for token, parts in run:
            for part in parts:
                style = STYLES[token.kind]
                text.append(part.text, style=f"{style} dim" if part.is_mark and "dim" not in style else style)
        text.append(CLOSE if is_supervised and not in_colour else "")
    return text


def _parts(shown: str, original: str) -> list[Part]:
    parts, start = [], 0
    for match in PIECE.finditer(shown):
        if match[0][0] == "·" and match[0] == original[match.start() : match.end()]:
            continue  # dots of the data itself
        if match.start() > start:
            parts.append(Part(shown[start : match.start()]))
        if match[0] == "\n":
            parts += [Part("⏎", is_mark=True), Part("\n")]
        else:
            parts.append(Part(match[0] if match[0][0] == "·" else _control(match[0]), is_mark=True))
        start = match.end()
    return [*parts, Part(shown[start:])] if start < len(shown) else parts


def _control(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return {"\t": "⇥\t", "\n": "⏎"}.get(character, chr(0x2400 + code))
    return "␡" if code == 0x7F else f"<U+{code:04X}>"
