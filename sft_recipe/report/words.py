"""Findings as sentences, in English and Chinese."""

from collections.abc import Callable
from typing import Any

from sft_recipe.language import fill, translator
from sft_recipe.report.chinese import CHINESE
from sft_recipe.report.chinese_page import CHINESE_PAGE
from sft_recipe.report.findings import Finding

FLAT = "{metric} goes from {start:.3f} to {end:.3f} in {steps:# step}, at a learning rate of up to {rate:.1e}."
WORSE = (
    "{metric} was {before:.3f} before the first step and is {after:.3f} now, at a learning rate of up to {rate:.1e}."
)

# By rule: what is wrong, the evidence, and the remedy.
SENTENCES = {
    "nonfinite": (
        "The loss or its gradient is not finite.",
        "{count} of {steps:# step}, the first one step {step}, at a learning rate of up to {rate:.1e}.",
        "Lower the learning rate to a fifth (--lr). If it is the first step, look for NaN in the model's weights, or "
        "compute in fp32 (fsdp.mixed_precision.param_dtype=fp32).",
    ),
    "exploded": (
        "The loss exploded.",
        "The smoothed loss was {low:.2f} and rose above 10 at step {step}, to {loss:.2f}; the learning rate reached "
        "{rate:.1e}.",
        "Lower the learning rate to a tenth (--lr), and keep GRAD_CLIP at 1 or less.",
    ),
    "rising": (
        "The loss rises instead of falling: the learning rate is too high.",
        "The smoothed loss goes from {start:.2f} to {end:.2f} and rises from step {step} on; the learning rate reached "
        "{rate:.1e}.",
        "Lower the learning rate to a fifth (--lr).",
    ),
    "oscillating": (
        "The loss oscillates: the learning rate is too high for the batch.",
        "The smoothed loss rose and fell {count:# time} by more than {size:.2f}; the learning rate reached {rate:.1e}.",
        "Halve the learning rate (--lr), or double the batch (--batch_size).",
    ),
    "short_warmup": (
        "The loss jumps at the start: the warm-up is too short.",
        "The loss was {start:.2f} and its mean rose to {peak:.2f}; the warm-up is {warmup} of {total:# step}, less "
        "than 3%.",
        "Warm up over 3% to 10% of the steps (--warmup_ratio 0.1).",
    ),
    "cut_data": (
        "Answers are cut off before their end.",
        "{count:,} of {records:# record} ({percent:.0f}%) {count:is|are} longer than MAX_LENGTH {limit:,} and cut off.",
        "Raise MAX_LENGTH (--max_length), or leave long records out (data.truncation=drop).",
    ),
    "no_end_token": (
        "The model is not trained to end its answers.",
        "In {count:,} of {sampled:# example} no end token has a loss.",
        "Look at the end of the answers in scripts/preview_data.py; the generation block of a chat template must "
        "include the end token.",
    ),
    "dropped_data": (
        "A large part of the data is left out.",
        "{count:,} of {records:# record} ({percent:.0f}%) {count:is|are} longer than MAX_LENGTH {limit:,}.",
        "Raise MAX_LENGTH (--max_length), or split long records.",
    ),
    "long_warmup": (
        "The warm-up is as long as the run: the learning rate never reaches its peak for good.",
        "The warm-up takes {warmup:# step} and the run {total}; the learning rate reached {reached:.1e} of {rate:.1e}.",
        "Warm up over 3% to 10% of the steps (--warmup_ratio 0.1; onecycle: optim.pct_start=0.3), without "
        "optim.lr_warmup_steps.",
    ),
    "few_supervised": (
        "Very few tokens are supervised.",
        "{supervised:,} of {tokens:# token} ({percent:.1f}%) {supervised:has|have} a loss.",
        "Look at scripts/preview_data.py: are the answers there, and does data.train_on select the turns that you "
        "mean? Long prompts that repeat can be shortened.",
    ),
    "large_batch": (
        "The batch is very large for the data: there are few updates.",
        "BATCH_SIZE {batch} makes {per_epoch:# step} an epoch and {total} in the run.",
        "Lower BATCH_SIZE to at least 20 steps an epoch, or train more epochs.",
    ),
    "low_rate": (
        "The loss does not fall: the learning rate is too low.",
        FLAT,
        "Raise the learning rate (--lr): 2e-5 is usual for full fine-tuning, 2e-4 with LoRA.",
    ),
    "flat_high": (
        "The loss stays high and flat: the model learns nothing.",
        FLAT,
        "Check the chat template and the language of the model with scripts/preview_data.py; then try a learning rate "
        "five times as high, and one of a fifth.",
    ),
    "flat": (
        "The loss does not fall.",
        FLAT,
        "Try half and twice the learning rate (--lr); look at the data with scripts/preview_data.py.",
    ),
    "slow": (
        "The loss falls too slowly.",
        "At the end the smoothed loss is {end:.2f}, from {start:.2f}, and still falls; the learning rate reached "
        "{rate:.1e}.",
        "Double the learning rate (--lr), or train more epochs (--epochs).",
    ),
    "overfitting": (
        "The model over-fits from step {step} on.",
        "The validation loss was best at step {step} ({best:.3f}) and is {last:.3f} now, while the training loss went "
        "from {before:.3f} to {now:.3f}.",
        "Use the checkpoint of that evaluation (checkpoints/best). Next time train fewer epochs, or set "
        "trainer.early_stopping.patience=2.",
    ),
    "high_rate": (
        "The model is worse than before training: the learning rate is too high for full fine-tuning.",
        WORSE,
        "Lower the learning rate to 1e-5 or less (--lr), or train adapters (--use_lora).",
    ),
    "forgetting": (
        "The model forgets what it knew.",
        "The loss on general prompts was {before:.3f} before the first step and is {after:.3f} now, at a learning rate "
        "of up to {rate:.1e}.",
        "Lower the learning rate (--lr) or the number of epochs, train adapters (--use_lora), or mix general examples "
        "into the data.",
    ),
    "worse_than_before": (
        "The model is worse than before training.",
        WORSE,
        "Check that training and validation data are of one kind, then lower the learning rate (--lr) or the number of "
        "epochs.",
    ),
    "empty": (
        "The model gives empty answers.",
        "{count} of {answers:# answer} at step {step} {count:is|are} empty.",
        "Look for empty responses in the data (scripts/preview_data.py), and lower the learning rate.",
    ),
    "repeated": (
        "The model repeats itself.",
        "{count} of {answers:# answer} at step {step} {count:ends|end} in a phrase that comes again and again.",
        "Train longer or with a higher learning rate if the loss still falls, else with a lower one and fewer epochs; "
        "look for duplicates in the data.",
    ),
    "endless": (
        "The answers do not end.",
        "{count} of {answers:# answer} at step {step} reached eval.max_new_tokens ({tokens}), past the end of "
        "the reference.",
        "Train longer if the loss still falls; check with scripts/preview_data.py that the end token is supervised.",
    ),
    "clipped": (
        "Gradients are clipped strongly in most steps.",
        "{percent:.0f}% of the steps exceed GRAD_CLIP {limit:g}; the median norm is {median:.1f}.",
        "Raise GRAD_CLIP to about the median if the loss is stable, else lower the learning rate.",
    ),
    "idle_ranks": (
        "Ranks wait for others in most steps.",
        "With {batch:# example} a step, {percent:.0f}% of the time of {ranks:# rank} is unused.",
        "Raise BATCH_SIZE to several examples for each rank, or use fewer ranks.",
    ),
    "padding": (
        "Most of what is computed is padding.",
        "{percent:.0f}% of the computed tokens are padding, with BATCH_SIZE {batch}.",
        "Raise BATCH_SIZE, so that examples of like length share a micro-batch, or lower MICRO_BATCH_SIZE.",
    ),
    "input_bound": (
        "Training waits for its data.",
        "{percent:.0f}% of the time ({seconds:.0f} s) went into reading examples.",
        "Put data.cache_dir on a fast local disk, and leave memory for the page cache.",
    ),
}
SUCCESS = "The goals are reached: loss {loss:.2f} (below 1.5) and BLEU-4 {bleu:.1f} (above 15)."


def report_translator(language: str) -> Callable[[str], str]:
    """Return a function that translates English text of the report; unknown text stays English."""
    return translator(language, CHINESE | CHINESE_PAGE)


def describe(finding: Finding, language: str = "en") -> dict[str, Any]:
    """Return rule, title, evidence and remedy of a finding, and all three as one `text`."""
    translate = report_translator(language)
    title, evidence, remedy = (fill(translate(text), **finding.evidence) for text in SENTENCES[finding.rule])
    text = (" " if language == "en" else "").join((title, evidence, remedy))
    return {"rule": finding.rule, "title": title, "evidence": evidence, "remedy": remedy, "text": text}
