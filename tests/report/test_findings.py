"""The rules: each fires on the fault that it is for, and none on a healthy run or on a near miss."""

import math
import re
from dataclasses import replace

import pytest

from sft_recipe.report.chinese import CHINESE
from sft_recipe.report.curves import ends, smooth, swings, uncertainty
from sft_recipe.report.findings import MOST, RULES, Finding, find_problems, success
from sft_recipe.report.outcome_rules import is_repetitive
from sft_recipe.report.words import SENTENCES, SUCCESS, describe
from tests.report.made import falling, make_run, noisy

GOOD = noisy(falling(100))
LOOP = "It is good. " * 12
TEXT = "The capital of France is Paris, a city on the river Seine."


def wave(steps: int, period: int, size: float) -> list[float]:
    return [2 + size * math.sin(2 * math.pi * step / period) for step in range(steps)]


def answers(*texts: str, truncated: bool = False) -> list[tuple[str, bool]]:
    return [(text, truncated) for text in texts]


# rule -> a run that has this fault, and a run that nearly has it
FAULTS = {
    "nonfinite": (
        make_run([*GOOD[:50], None, None, *GOOD[50:]]),
        make_run(GOOD, norms=[3.0] * 100),
    ),
    "exploded": (
        make_run(GOOD[:40] + noisy([2 + min(step, 12) for step in range(60)])),
        make_run(noisy(falling(100, start=11.5, end=1.4))),  # an untrained model starts above 10
    ),
    "rising": (
        make_run(noisy([2 + step / 30 for step in range(100)])),
        make_run([*GOOD[:-1], 2.4]),  # the last raw loss alone is high
    ),
    "oscillating": (
        make_run(noisy(wave(120, period=40, size=0.9))),
        make_run(noisy(falling(100), size=0.25)),  # batches that differ
    ),
    "short_warmup": (
        make_run(noisy([1.4] + [3.5] * 9 + [1.3] * 90), optim__lr_warmup_steps_ratio=0.0),
        make_run(GOOD, optim__lr_warmup_steps_ratio=0.0),
    ),
    "long_warmup": (
        make_run(GOOD, optim__lr_warmup_steps=500),
        make_run(GOOD, optim__lr_warmup_steps=60),
    ),
    "cut_data": (
        make_run(GOOD, data={"records": 100, "cut": 30, "sampled": 100, "without_end": 30}),
        make_run(GOOD, data={"records": 100, "cut": 3, "sampled": 100, "without_end": 3}),
    ),
    "no_end_token": (
        make_run(GOOD, data={"records": 100, "sampled": 100, "without_end": 100}),
        make_run(GOOD, data={"records": 100, "sampled": 100, "without_end": 0}),
    ),
    "dropped_data": (
        make_run(GOOD, data={"records": 100, "dropped": 60}),
        make_run(GOOD, data={"records": 100, "dropped": 10}),
    ),
    "few_supervised": (make_run(GOOD, supervised=10), make_run(GOOD, supervised=60)),
    "large_batch": (
        make_run(falling(9, end=2), per_epoch=3, data__train_batch_size=64),
        make_run(falling(9, end=2), per_epoch=3, data__train_batch_size=4),
    ),
    "low_rate": (
        make_run(noisy([2.4] * 100), rate=1e-7),
        make_run(noisy(falling(100, 2.4, 2.1), size=0.03), rate=1e-6),
    ),
    "flat_high": (make_run(noisy([4.6] * 100)), make_run(noisy(falling(100, 4.6, 2.5)))),
    "flat": (make_run(noisy([2.4] * 100)), make_run(noisy([1.2] * 100))),
    "slow": (make_run(noisy(falling(100, 5.5, 3.6))), make_run(noisy(falling(100, 5.5, 2.4)))),
    "overfitting": (
        make_run(noisy(falling(100, end=0.4)), validation={0: 2.4, 25: 1.5, 50: 1.6, 75: 1.8, 100: 2.2}),
        make_run(noisy(falling(100, end=0.4)), validation={0: 2.4, 25: 1.5, 50: 1.49, 75: 1.5, 100: 1.51}),
    ),
    "high_rate": (
        make_run(GOOD, validation={0: 1.8, 100: 2.3}, rate=1e-3),
        make_run(GOOD, validation={0: 1.8, 100: 1.4}, rate=1e-3),
    ),
    "forgetting": (
        make_run(GOOD, validation={0: 2.4, 100: 1.4}, general={0: 1.5, 100: 2.4}),
        make_run(GOOD, validation={0: 2.4, 100: 1.4}, general={0: 1.5, 100: 1.55}),
    ),
    "worse_than_before": (
        make_run(GOOD, bleu={0: 18.0, 100: 4.0}, rate=2e-4, perf={"eval/samples": 50}, lora__enabled=True),
        make_run(GOOD, bleu={0: 18.0, 100: 17.0}, rate=2e-4, perf={"eval/samples": 50}, lora__enabled=True),
    ),
    "empty": (
        make_run(GOOD, answers=answers("", " ", TEXT, TEXT)),
        make_run(GOOD, answers=answers("", TEXT, TEXT, TEXT, TEXT)),
    ),
    "repeated": (
        make_run(GOOD, answers=answers(LOOP, LOOP, TEXT, TEXT, truncated=True)),
        make_run(GOOD, answers=answers("ha ha ha ha", TEXT, TEXT, TEXT)),
    ),
    "endless": (
        make_run(GOOD, answers=answers(TEXT, TEXT, TEXT, TEXT, truncated=True)),
        make_run(GOOD, answers=answers(TEXT, TEXT, TEXT, TEXT, truncated=True), reference=TEXT * 2),
    ),
    "idle_ranks": (
        make_run(GOOD, perf={"perf/token_efficiency": 0.5}, trainer__n_gpus_per_node=2),
        make_run(GOOD, perf={"perf/token_efficiency": 0.85}, trainer__n_gpus_per_node=2),
    ),
    "padding": (
        make_run(GOOD, perf={"perf/token_efficiency": 0.4}),
        make_run(GOOD, perf={"perf/token_efficiency": 0.65}),
    ),
    "input_bound": (make_run(GOOD, perf={"perf/data_seconds": 0.3}), make_run(GOOD, perf={"perf/data_seconds": 0.03})),
    "clipped": (make_run(GOOD, norms=[90.0] * 70 + [0.5] * 30), make_run(GOOD, norms=[12.0] * 100)),
}


def names(run):
    return [finding.rule for finding in find_problems(run)]


def test_every_rule_has_a_fault_and_a_sentence():
    assert set(FAULTS) == set(SENTENCES) == {rule.name for rule in RULES}


@pytest.mark.parametrize("rule", FAULTS)
def test_a_fault_is_the_first_finding(rule):
    assert names(FAULTS[rule][0])[:1] == [rule]


@pytest.mark.parametrize("rule", FAULTS)
def test_a_near_miss_has_no_finding(rule):
    assert names(FAULTS[rule][1]) == []


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.25])
def test_healthy_runs_have_no_finding(seed, noise):
    for steps in (1, 5, 30, 300):
        assert names(make_run(noisy(falling(steps), seed, noise))) == []
        assert names(make_run(noisy([1.1] * steps, seed, noise))) == []


def test_evidence_is_measured():
    (found,) = find_problems(FAULTS["overfitting"][0])
    assert (found.evidence["step"], found.evidence["best"], found.evidence["last"]) == (25, 1.5, 2.2)
    (found,) = find_problems(FAULTS["nonfinite"][0])
    assert (found.evidence["count"], found.evidence["step"], found.evidence["steps"]) == (2, 51, 102)
    (found,) = find_problems(FAULTS["few_supervised"][0])
    assert (found.evidence["supervised"], found.evidence["tokens"]) == (1000, 100000)
    (found,) = find_problems(FAULTS["clipped"][0])
    assert (found.evidence["percent"], found.evidence["median"]) == (70.0, 90.0)


def test_every_sentence_is_translated():
    texts = [SUCCESS, *(text for texts in SENTENCES.values() for text in texts)]
    assert [text for text in texts if text not in CHINESE] == []
    fields = re.compile(r"{(\w+)")
    assert all(set(fields.findall(text)) == set(fields.findall(CHINESE[text])) for text in texts)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_sentences_have_the_evidence(language):
    for rule, (run, _) in FAULTS.items():
        finding = find_problems(run)[0]
        text = describe(finding, language)
        assert text["rule"] == rule and "{" not in text["text"]
        assert text["title"] in text["text"] and text["remedy"] in text["text"]
    assert "best at step 25 (1.500) and is 2.200 now" in describe(find_problems(FAULTS["overfitting"][0])[0])["text"]


def test_findings_of_one_topic_are_one_finding():
    everything = make_run(
        noisy([4.6] * 100),
        norms=[50.0] * 100,
        validation={0: 4.0, 50: 4.4, 100: 4.6},
        answers=answers(LOOP, LOOP, "", "", truncated=True),
        supervised=5,
        optim__lr_warmup_steps=500,
    )
    assert names(everything) == ["long_warmup", "high_rate", "empty", "clipped"]


def test_at_most_five_are_shown():
    everything = make_run(
        [*noisy([4.6] * 100), None],
        norms=[90.0] * 101,
        validation={0: 4.0, 50: 4.4, 101: 4.6},
        answers=answers("", "", "", "", truncated=True),
        data={"records": 100, "cut": 90},
        optim__lr_warmup_steps=500,
    )
    assert names(everything) == ["nonfinite", "cut_data", "long_warmup", "high_rate", "empty"]
    assert len({rule.topic for rule in RULES}) > MOST == 5


def test_flatness_is_judged_by_the_validation_loss_where_it_was_measured_before_training():
    """Noise of the batches hides a flat curve, and a fall that batches hide is none."""
    noise = noisy([3.0] * 30, size=0.2)
    assert names(make_run(noise, validation={0: 3.5, 10: 3.506, 30: 3.499}, rate=1e-7)) == ["low_rate"]
    assert names(make_run(noise, validation={0: 3.5, 10: 3.3, 30: 3.1})) == []
    falling_general = make_run(noise, validation={0: 3.5, 30: 3.499}, general={0: 2.0, 30: 1.2}, rate=1e-7)
    assert names(falling_general) == ["low_rate"]
    assert falling_general.validation.values == pytest.approx([3.5, 3.499])


def test_a_training_loss_that_only_wavers_is_no_overfitting():
    losses = noisy([0.8] * 10 + [0.5] * 20, size=0.3)
    scores = {"validation": {0: 0.75, 10: 0.45, 20: 0.65, 30: 0.7}, "general": {0: 1.8, 10: 3.1, 20: 4.1, 30: 5.6}}
    assert names(make_run(losses, **scores, rate=5e-4)) == ["forgetting"]


def test_a_habit_from_before_training_is_given_time():
    """Half of the answers repeat a phrase: a finding if they did not at step 0, or at the end of the run."""
    texts = answers(LOOP, LOOP, TEXT, TEXT)
    before = [{"step": 0, "samples": make_run(GOOD, answers=texts).samples[0]["samples"]}]
    better = [{"step": 0, "samples": make_run(GOOD, answers=answers(TEXT, TEXT, TEXT, TEXT)).samples[0]["samples"]}]
    running, over = (make_run(GOOD, answers=texts, trainer__total_training_steps=steps) for steps in (1000, 100))
    assert names(replace(running, samples=before + running.samples)) == []
    assert names(replace(running, samples=better + running.samples)) == ["repeated"]
    assert names(replace(over, samples=before + over.samples)) == ["repeated"]
    assert names(make_run(GOOD, answers=answers(LOOP, TEXT, TEXT, TEXT))) == []


def test_one_easy_batch_at_the_start_is_no_jump():
    losses = [0.9, *noisy(falling(60, 2.4, 1.3), size=0.4)]
    assert max(smooth(losses[1:10])) > 1.5 * losses[0]
    assert names(make_run(losses, optim__lr_warmup_steps_ratio=0.0)) == []


def test_a_validation_loss_that_rises_is_not_called_flat():
    losses = noisy(falling(60, 2.4, 1.3))
    assert names(make_run(losses, validation={0: 2.0, 30: 2.05, 60: 2.1}, rate=1e-5)) == ["worse_than_before"]


def test_a_flat_curve_within_the_warmup_is_no_finding():
    assert names(make_run(noisy([2.4] * 30), trainer__total_training_steps=1000)) == []


def test_a_loss_of_bleu_counts_by_the_number_of_answers():
    few, many = ({"eval/samples": count} for count in (6, 400))
    scores = {0: 18.0, 100: 12.0}
    assert names(make_run(GOOD, bleu=scores, perf=few)) == []
    assert names(make_run(GOOD, bleu=scores, perf=many)) == ["high_rate"]


def test_a_rising_loss_is_not_also_called_flat():
    assert names(FAULTS["rising"][0]) == ["rising"]


def test_success_needs_loss_and_bleu():
    assert success(make_run(GOOD, bleu={100: 20.0}))["bleu"] == 20.0
    assert success(make_run(GOOD, bleu={100: 12.0})) is None
    assert success(make_run(noisy(falling(100, end=1.9)), bleu={100: 20.0})) is None
    assert success(make_run(GOOD)) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LOOP, True),
        ("好的，好的，好的，好的，好的，好的，好的，好的，", True),
        ("Sure: " + "a, b and c; " * 9 + "a, b", True),
        (TEXT, False),
        ("1. a\n2. b\n3. c\n4. d", False),
        ("", False),
        ("....", False),
        ("Well. " * 4 + TEXT * 2, False),
    ],
)
def test_repetition(text, expected):
    assert is_repetitive(text) is expected


def test_curves():
    assert smooth([1, 2, 3, 4]) == [1.5, 2.0, 3.0, 3.5]
    assert smooth([5.0] * 40) == [5.0] * 40
    assert ends([1, 2, 3, 7, 8, 9]) == (2.0, 8.0)
    assert uncertainty([0, 2, 0, 2, 0, 2]) == pytest.approx(math.sqrt(4 / 3))  # noise 1.41, means of three
    assert swings([0, 2, 0, 2, 0], 1) == 2 and swings([3, 2, 1, 0], 1) == 0 and swings([0, 2], 1) == 0


def test_a_single_step_is_no_plural():
    few = {"batch": 64, "per_epoch": 1, "total": 3}
    assert "BATCH_SIZE 64 makes 1 step an epoch and 3 in the run." in describe(Finding("large_batch", few))["text"]
    one = {"count": 1, "records": 1, "percent": 100.0, "limit": 2048}
    assert "1 of 1 record (100%) is longer than MAX_LENGTH 2,048." in describe(Finding("dropped_data", one))["text"]
