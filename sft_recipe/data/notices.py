"""Words the notices about records that were dropped, cut or changed, so that nothing of that happens silently."""

from pathlib import Path

from sft_recipe.config.schema import DataConfig
from sft_recipe.data.token_store import StoreReport
from sft_recipe.errors import DataError


def data_notices(report: StoreReport, part: str, data: DataConfig, rejected: Path) -> list[str]:
    """Return notices about a store; `part` is train or validation, `rejected` the file with its bad records.

    Raises DataError if more than `data.max_bad_ratio` of the records are bad.
    """
    notices = []
    records = f"{report.records:,} records"
    bad = sum(report.rejected.values())
    if bad:
        notice = f"{part}: {bad:,} of {records} cannot be used ({report.rejected_kinds}); see {rejected}"
        if bad > data.max_bad_ratio * report.records:
            raise DataError(f"{notice}. That is more than data.max_bad_ratio={data.max_bad_ratio:g} of them.")
        notices.append(f"{notice}.")
    if report.too_long:
        action = {"drop": "left out", "right": "cut off at the end"}[data.truncation]
        percent = 100 * report.too_long / report.records
        notices.append(
            f"{part}: {report.too_long} of {report.records} examples ({percent:.1f}%) are longer than "
            f"{data.max_length} tokens and {action} (data.truncation={data.truncation}); "
            f"the longest has {report.longest_text} tokens."
        )
    if report.without_target:
        examples = f"{report.without_target} of {report.records} examples"
        notices.append(f"{part}: {examples} have no supervised token left and are left out.")
    if report.special_text:
        notices.append(
            f"{part}: {report.special_text:,} of {records} contain the text of a special token; "
            "it stays text (data.parse_special_tokens)."
        )
    if report.dropped_reasoning:
        notices.append(
            f"{part}: the chat template drops the reasoning (up to </think>) in the last turn of "
            f"{report.dropped_reasoning:,} of {records}, so the model is not trained on it; "
            "set model.chat_template to a template that keeps it."
        )
    if report.earlier_without_reasoning:
        notices.append(
            f"{part}: {report.earlier_without_reasoning:,} answers are trained without their reasoning, which the chat "
            "template drops once a user turn follows; to train on it, end one example with each answer and set "
            "data.train_on=last, or set model.chat_template to a template that keeps it."
        )
    notices += [f"{part}: {sentence}." for sentence in report.remarks.sentences()]
    return notices
