"""Statistics of a dataset, compared with numbers computed by hand."""

import pytest

from sft_recipe.data.preview import stats as stats_module
from sft_recipe.data.preview.stats import DatasetStats, Duplicates, Settings
from sft_recipe.data.preview.terminal import summary, tokens_of
from sft_recipe.data.rendering.renderer import Encoded, Renderer
from sft_recipe.data.sources import SourceCounts
from sft_recipe.errors import DataError
from tests.data.preview.examples import conversation, stats_of, stats_of_masks
from tests.support import tiny

FOUR = ("0011", "0001111100", "000001", "01")  # 4, 10, 6 and 2 tokens


def test_lengths_and_supervised_counts_cover_every_record():
    result = stats_of_masks(*FOUR)
    assert result.records == 4
    assert result.lengths.tolist() == [4, 10, 6, 2]
    assert result.supervised.tolist() == [2, 5, 1, 1]


def test_truncation_drop_loses_the_complete_record():
    loss = stats_of_masks(*FOUR, max_length=6, truncation="drop").truncation()
    assert (loss.records, loss.tokens, loss.supervised, loss.without_target) == (1, 10, 5, 0)
    assert loss.lengths.tolist() == [4, 6, 2]


def test_truncation_right_loses_the_end_of_the_record():
    loss = stats_of_masks(*FOUR, max_length=6, truncation="right").truncation()
    assert (loss.records, loss.tokens, loss.supervised, loss.without_target) == (1, 4, 2, 0)
    assert loss.lengths.tolist() == [4, 6, 6, 2]


def test_a_record_without_a_remaining_supervised_token_is_left_out():
    loss = stats_of_masks("0011", "00000011", "000", max_length=5, truncation="right").truncation()
    assert (loss.records, loss.tokens, loss.supervised, loss.without_target) == (1, 3, 2, 2)
    assert loss.lengths.tolist() == [4]


def test_a_record_of_exactly_max_length_is_not_too_long():
    assert stats_of_masks(*FOUR, max_length=10).truncation().records == 0


def test_packing_saves_the_padding():
    """Batches (4, 6) and (2): padded 12 + 2; budget 6 holds one of the first two at a time."""
    result = stats_of_masks(*FOUR, max_length=6, batch_size=2, token_budget=6, order="file").packing()
    assert (result.padded, result.packed, result.steps, result.micro_batches, result.capacity) == (14, 12, 2, 3, 18)
    assert result.saved == pytest.approx(2 / 14)


def test_packing_uses_the_order_of_the_first_epoch():
    masks = ["0" * (length - 1) + "1" for length in (9, 2, 8, 3, 7, 4)]
    batches = list(stats_module.epoch_batches(6, Settings(batch_size=2, seed=3)))
    padded = sum(2 * max(len(masks[number]) for number in batch) for batch in batches)
    assert sorted(number for batch in batches for number in batch) == list(range(6))
    assert stats_of_masks(*masks, batch_size=2, seed=3).packing().padded == padded


def test_packing_mixes_the_sources_as_training_does():
    """Twice the first source's 4 and 2 tokens (10 is too long), one of the second's two records."""
    result = DatasetStats(Settings(max_length=6, batch_size=1, token_budget=6))
    for mask in ("0011", "0001111100", "01"):
        result.add(conversation("Hi", "Yes"), Encoded([7] * len(mask), [int(bit) for bit in mask]))
    result.end_source("a.json", lambda examples: 2 * examples)
    for mask in ("011", "101"):
        result.add(conversation("Hi", "Yes"), Encoded([7] * 3, [int(bit) for bit in mask]))
    result.end_source("b.json", lambda examples: 1)
    assert result.truncation().sources == [SourceCounts("a.json", 2, 4), SourceCounts("b.json", 2, 1)]
    assert (result.packing().packed, result.packing().steps) == (4 + 4 + 2 + 2 + 3, 5)
    assert "an epoch contains 4 of 2 from a.json, 1 of 2 from b.json" in summary(result)


def test_a_source_without_remaining_examples_is_ignored():
    result = DatasetStats(Settings(max_length=2))
    for mask in ("0011", "01"):
        result.add(conversation("Hi", "Yes"), Encoded([7] * len(mask), [int(bit) for bit in mask]))
        result.end_source("a.json", lambda examples: 5)
    assert result.packing().packed == 10
    nothing = stats_of_masks("0011", max_length=2).packing()
    assert (nothing.packed, nothing.steps, nothing.saved) == (0, 0, 0.0)


def test_text_that_spells_a_special_token_is_counted_and_displayed_as_text(renderer):
    result = stats_of([conversation("Hi", "Yes"), conversation("<|im_end|>", "Say <|im_start|>user")], renderer)
    tokens = tokens_of(result.sample[1], renderer, 10**6)
    assert result.special_text == 1 and "1 record with text that spells a special token" in summary(result)[-1]
    assert sum(token.is_special for token in tokens) == 4
    assert "".join(token.text for token in tokens if token.is_supervised) == "Say <|im_start|>user<|im_end|>"


def test_duplicates_are_counted_and_listed_with_their_sources():
    """Of five records 1, 3 and 5 are the same; 2 and 4 differ in ids, 6 in its mask alone."""
    result = stats_of_masks("0011", "0011", "0011", "001", "0011", "0011", "0101")
    repeats, repeated = result.duplicates()
    assert repeats == 3
    first = Duplicates(3, ["a.json, record 1", "a.json, record 3", "a.json, record 5"])
    assert repeated == [first, Duplicates(2, ["a.json, record 2", "a.json, record 6"])]


@pytest.mark.parametrize("source", ["a.json, record 12", "b.jsonl, line 007", "", "12", "a, record 0", "a " + "9" * 30])
def test_the_source_list_returns_sources_unchanged(source):
    sources = stats_module._SourceList()
    for text in ("x, record 1", source, "x, record 2"):
        sources.append(text)
    assert [sources[index] for index in range(3)] == ["x, record 1", source, "x, record 2"]


def test_longest_and_least_supervised_records_are_sorted_and_ties_keep_data_order():
    result = stats_of_masks("0011", "001", "000001", "01", "0111", "011", "000011")
    assert [example.number for example in result.longest] == [2, 6, 0, 4, 1]
    assert [example.number for example in result.least_supervised] == [1, 2, 3, 0, 5]


def test_the_sample_is_seeded_sorted_and_contained_in_larger_samples():
    def numbers(show: int, seed: int = 1) -> list[int]:
        result = DatasetStats(Settings(seed=seed), show)
        for number in range(100):
            result.add(conversation("Hi", "Yes"), Encoded([number, 1], [0, 1]))
        return [example.number for example in result.sample]

    assert numbers(5) == numbers(5) == sorted(numbers(5)) != numbers(5, seed=2)
    assert set(numbers(5)) < set(numbers(20))
    assert numbers(0) == [] and numbers(1000) == list(range(100))


def test_bad_records_are_rejected_with_their_error_and_the_others_are_counted(tokenizer):
    refuses = tiny.CHATML.replace(
        "{% for", "{% if 'bad' in messages[0].content %}{{ raise_exception('no') }}{% endif %}{% for", 1
    )
    talks = [conversation(text, "Yes", source=f"a, record {n}") for n, text in enumerate(["Hi", "bad", "Hello"], 1)]
    records = [talks[0], DataError("a, record 9: broken.", "malformed"), *talks[1:]]
    result = DatasetStats()
    result.read(records, Renderer(tokenizer, chat_template=refuses))
    assert (result.records, result.rejected) == (2, 2)
    assert result.reasons[0] == "a, record 9: broken." and result.reasons[1].startswith("a, record 2: ")
    assert [example.record.source for example in result.sample] == ["a, record 1", "a, record 3"]
    lines = summary(result)[-2:]
    assert lines == [
        "2 records rejected (1 malformed, 1 template): training stops; first error:",
        "  a, record 9: broken.",
    ]


def test_the_chunk_size_does_not_change_the_statistics(renderer, monkeypatch):
    talks = [
        conversation("Hi " * number, "Yes " * (number % 4 + 1), source=f"a, record {number}") for number in range(1, 12)
    ]
    expected = stats_of(talks, renderer)
    monkeypatch.setattr(stats_module, "CHUNK", 3)
    assert stats_of(talks, renderer).lengths.tolist() == expected.lengths.tolist()
    assert expected.lengths.tolist() == [len(renderer.encode(talk).input_ids) for talk in talks]
