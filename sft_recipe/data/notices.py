"""Words the notices about records that were dropped, cut or changed, and about ranks that wait: nothing is silent."""

from pathlib import Path

import numpy as np

from sft_recipe.config.schema import DataConfig
from sft_recipe.data.batching import efficient_batch_size, highest_efficiency
from sft_recipe.data.token_store import StoreReport
from sft_recipe.errors import DataError
from sft_recipe.language import plural

IDLE, WANTED = 0.8, 0.9  # of the ranks' time: with less in use there is a notice, which advises on this much


def idle_notice(lengths: np.ndarray, batch_size: int, ranks: int) -> str | None:
    """Return a notice where ranks wait for the one with the longest example; `lengths` in the order of training."""
    used = highest_efficiency(lengths, batch_size, ranks)
    if used >= IDLE:
        return None
    better = efficient_batch_size(lengths, batch_size, ranks, WANTED)
    advice = "Use fewer ranks or lower MAX_LENGTH: no batch size of this data mends that."
    if better:
        most = 100 * highest_efficiency(lengths, better, ranks)
        advice = f"BATCH_SIZE {better} allows {most:.0f}%."
    return (
        f"BATCH_SIZE {batch_size} (data.train_batch_size) keeps {plural(ranks, 'rank')} busy for at most "
        f"{100 * used:.0f}% of their time, since all wait for the rank with the longest example. {advice}"
    )


def data_notices(report: StoreReport, part: str, data: DataConfig, rejected: Path) -> list[str]:
    """Return notices about a store; `part` is train or validation, `rejected` the file with its bad records.

    Raises DataError if more than `data.max_bad_ratio` of the records are bad.
    """
    notices = []
    records = plural(report.records, "record")
    bad = sum(report.rejected.values())
    if bad:
        notice = f"{part}: {bad:,} of {records} cannot be used ({report.rejected_kinds}); see {rejected}"
        if bad > data.max_bad_ratio * report.records:
            raise DataError(f"{notice}. That is more than data.max_bad_ratio={data.max_bad_ratio:g} of them.")
        notices.append(f"{notice}.")
    if report.too_long:
        action = {"drop": "left out", "right": "cut off at the end"}[data.truncation]
        percent, examples = 100 * report.too_long / report.records, plural(report.records, "example")
        limits = f"longer than {plural(data.max_length, 'token')}"
        longest = f"the longest has {report.longest_text} tokens"
        if data.has_targets:
            limits = f"longer than {data.max_length} (source) or {data.max_target_length} tokens (answer)"
            longest = f"the longest have {report.longest} and {report.longest_target}"
        notices.append(
            f"{part}: {report.too_long} of {examples} ({percent:.1f}%) {limits}, {action} "
            f"(data.truncation={data.truncation}); {longest}."
        )
    if report.without_target:
        examples = f"{report.without_target} of {plural(report.records, 'example')}"
        notices.append(f"{part}: {examples} left out: no supervised token remains.")
    if report.special_text:
        notices.append(
            f"{part}: {report.special_text:,} of {records} with the text of a special token; "
            "it stays text (data.parse_special_tokens)."
        )
    if report.dropped_reasoning:
        notices.append(
            f"{part}: the chat template drops the reasoning (up to </think>) in the last turn of "
            f"{report.dropped_reasoning:,} of {records}, so the model is not trained on it; "
            "set model.chat_template to a template that keeps it."
        )
    if report.earlier_without_reasoning and data.split_turns == "auto":
        notices.append(
            f"{part}: {plural(report.earlier_without_reasoning, 'answer')} trained without reasoning, which the chat "
            "template drops once a user turn follows; data.split_turns=true makes an example of each answer, with the "
            "reasoning, as at inference."
        )
    if report.joined_starts:
        answers = plural(report.joined_starts, "answer")
        notices.append(
            f"{part}: {answers} whose first token also has the end of the prompt in it, such as a space, so it is not "
            "trained on, and at inference the prompt is tokenized differently; set model.chat_template to a template "
            "whose generation prompt does not end in a space."
        )
    notices += [f"{part}: {sentence}." for sentence in report.remarks.sentences()]
    return notices
