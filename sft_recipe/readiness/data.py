"""Checks of the data: what can be read, lengths, empty values, duplicates, and what validation shares with training."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sft_recipe.config.schema import Config
from sft_recipe.data.columns import Columns
from sft_recipe.data.messages import Conversation
from sft_recipe.data.pipeline import read_data
from sft_recipe.data.readers import BadRecord, read_records
from sft_recipe.data.run_inputs import RunInputs
from sft_recipe.data.sources import resolve_files
from sft_recipe.data.token_store import Examples
from sft_recipe.errors import DataError, RecipeError
from sft_recipe.readiness.findings import Check, failed, passed, warned

REASONS = "scripts/preview_data.py --html FILE lists reasons"
SHOWN = 4  # names in a message
MANY = 0.05  # of the records


def record_checks(config: Config) -> Iterator[Check]:
    """Yield the checks of the training records as they are read, before any tokenization."""
    try:
        files = [file for source in resolve_files(config.data.train_files, config.cache_dir()) for file in source.files]
        yield from _records(config, files)
    except RecipeError as error:
        yield failed("data", "{error}", "scripts/preview_data.py shows the data", error=error)


def _records(config: Config, files: list[Path]) -> Iterator[Check]:
    nulls: Counter[str] = Counter()
    characters, total, bad, first, formats = [], 0, 0, None, Counter(file.suffix for file in files)
    for file in files:
        for _, record in read_records(file):
            total += 1
            if isinstance(record, dict):
                nulls.update(key for key, value in record.items() if value is None or value == "")
        columns = Columns(config.data.columns, config.data.roles)
        for item in read_data(file, config.data.format, columns, is_encoder_decoder=config.data.has_targets):
            if isinstance(item, Conversation):
                characters.append(sum(len(message.content or "") for message in item.messages))
            elif isinstance(item, BadRecord):
                bad, first = bad + 1, first or item.error
    found = dict(files=len(files), kinds=", ".join(sorted(formats)), total=total)
    yield passed("data", "{total:# record} in {files:# file} ({kinds})", **found)
    if first:
        yield _bad(config, bad, total, first)
    if nulls:
        names = ", ".join(f"{name} ({count:,})" for name, count in nulls.most_common(SHOWN))
        yield passed("empty values", "empty or null fields: {names}", names=names)
    if characters:
        low, middle, high = np.quantile(characters, [0, 0.5, 1], method="lower")
        text = "{low:,} to {high:# character}, median {middle:,}"
        yield passed("length of texts", text, low=int(low), middle=int(middle), high=int(high))


def _bad(config: Config, bad: int, total: int, first: DataError) -> Check:
    text = "{bad:,} of {total:# record} cannot be used; the first: {first}"
    allowed = config.data.max_bad_ratio
    found = dict(bad=bad, total=total, first=first, allowed=allowed, reasons=REASONS)
    is_over = bad > allowed * total
    if config.data.on_bad_record == "skip" and not is_over:
        return warned("bad records", text, "{reasons}", **found)
    remedy = "correct them ({reasons}), or data.on_bad_record=skip"
    if is_over:
        remedy += " with a data.max_bad_ratio above {allowed:g}"
    return failed("bad records", text, remedy, **found)


def example_checks(config: Config, inputs: RunInputs, notices: list[str]) -> Iterator[Check]:
    """Yield the checks of the tokenized examples; `notices` are those that preparing them gave."""
    for notice in notices:
        yield warned("data notice", "{notice}", "", notice=notice)
    lengths = inputs.train.lengths
    middle, p95, longest = np.quantile(lengths, [0.5, 0.95, 1], method="lower")
    supervised, tokens = inputs.train.supervised, int(lengths.sum())
    yield passed(
        "length of examples",
        "{examples:# example}, {tokens:# token}, {share:.0f}% supervised; median {middle:,}, p95 {p95:,}, longest "
        "{longest:,} of {limits}",
        examples=len(lengths), tokens=tokens, share=100 * supervised / tokens, middle=int(middle), p95=int(p95),
        longest=int(longest), limits=_limits(config),
    )  # fmt: skip
    digests = _digests(inputs.train)
    repeated = len(digests) - len(np.unique(digests))
    if repeated > MANY * len(digests):
        remedy = "scripts/prepare_sft_data.py drops exact duplicates"
        yield warned("duplicates", "{count:# exact duplicate}", remedy, count=repeated)
    else:
        yield passed("duplicates", "{count:# exact duplicate}", count=repeated)
    yield from _validation(inputs, digests)


def _limits(config: Config) -> str:
    limits = {"MAX_LENGTH": config.data.max_length, "MAX_TARGET_LENGTH": config.data.max_target_length}
    return " + ".join(f"{name} {limit:,}" for name, limit in limits.items() if limit is not None)


def _validation(inputs: RunInputs, train: np.ndarray) -> Iterator[Check]:
    if not inputs.validation:
        yield warned("validation", "there is no validation data", "--val_data FILE, or data.val_ratio=0.05")
    for name, examples in inputs.validation.items():
        shared = int(np.isin(_digests(examples), train).sum())
        found = dict(name=name or "validation", count=len(examples), shared=shared)
        if shared:
            text = "{name}: {shared:,} of {count:# example} {shared:is|are} also trained on, so its loss looks too good"
            yield warned("validation", text, "data.val_ratio=0.05 splits without overlap", **found)
        else:
            yield passed("validation", "{name}: {count:# example}, none of them trained on", **found)


def _digests(examples: Examples) -> np.ndarray:
    return examples.store.digests[examples.numbers]
