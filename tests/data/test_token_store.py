"""Token stores have the renderer's ids and masks, are memory-mapped, and have a fingerprint."""

import numpy as np
import pytest

from sft_recipe.data.token_store import Examples
from tests.data.stores import RECORDS, build, encoded, examples, write
from tests.support import tiny


def test_store_has_the_ids_and_masks_of_the_renderer(data, tokenizer, cache_dir):
    store = build(data, tokenizer, cache_dir)
    expected = encoded(tokenizer, data)
    assert examples(store) == expected
    assert len(store) == len(RECORDS)
    assert store.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert store.supervised.tolist() == [sum(mask) for _, mask in expected]
    assert {ids.dtype for ids, _ in (store[0], store[3])} == {np.dtype(np.int32)}
    assert {mask.dtype for _, mask in (store[0], store[3])} == {np.dtype(np.uint8)}


def test_files_are_stored_in_the_given_order(data, tokenizer, cache_dir, tmp_path):
    other = tmp_path / "a.jsonl"
    other.write_text('{"instruction": "add", "output": "1 2"}\n')
    assert examples(build([data, other], tokenizer, cache_dir)) == encoded(tokenizer, data, other)
    assert examples(build([other, data], tokenizer, cache_dir)) == encoded(tokenizer, other, data)


def test_report_counts_records_and_tokens(data, tokenizer, cache_dir):
    report = build(data, tokenizer, cache_dir).report
    expected = encoded(tokenizer, data)
    assert (report.records, report.examples, report.too_long, report.without_target) == (4, 4, 0, 0)
    assert report.longest == max(len(ids) for ids, _ in expected)
    assert report.tokens == sum(len(ids) for ids, _ in expected)
    assert report.supervised == sum(sum(mask) for _, mask in expected)


def test_store_is_memory_mapped_and_read_only(data, tokenizer, cache_dir):
    """So that a rank's own memory does not grow with the data."""
    store = build(data, tokenizer, cache_dir)
    for array in (*store[0], store.offsets, store.supervised, store.digests):
        assert isinstance(array, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7


def test_examples_select_from_a_store(data, tokenizer, cache_dir):
    store = build(data, tokenizer, cache_dir)
    part = Examples(store, np.array([3, 1]))
    assert len(part) == 2
    assert part.lengths.tolist() == [store.lengths[3], store.lengths[1]]
    assert part.supervised == store.supervised[3] + store.supervised[1]
    assert part[1][0].tolist() == store[1][0].tolist()


def test_equal_examples_have_equal_fingerprints(data, tokenizer, cache_dir, tmp_path):
    """The fingerprint does not depend on key order, format, file or limit, as long as the tokens are equal."""
    roles = {"user": "prompt", "assistant": "response"}
    turns = [[{"role": role, "content": record[field]} for role, field in roles.items()] for record in RECORDS]
    same = write(tmp_path / "other.json", [{"messages": messages} for messages in turns])
    first = build(data, tokenizer, cache_dir)
    second = build(same, tokenizer, cache_dir, max_length=1000)
    assert first.folder != second.folder
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    "records",
    [
        RECORDS[::-1],
        RECORDS[:-1],
        [*RECORDS, RECORDS[0]],
        [*RECORDS[:2], {**RECORDS[2], "prompt": "1 2 9"}, RECORDS[3]],
    ],
    ids=["order", "fewer", "more", "one token"],
)
def test_different_examples_have_different_fingerprints(records, data, tokenizer, cache_dir, tmp_path):
    other = write(tmp_path / "other.json", records)
    assert build(data, tokenizer, cache_dir).fingerprint != build(other, tokenizer, cache_dir).fingerprint


def test_fingerprint_depends_on_the_mask(data, tokenizer, cache_dir, tmp_path):
    marked = tiny.CHATML.replace(
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
        "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
        "{{ '<|im_end|>' + '\n' }}",
    )
    first = build(data, tokenizer, cache_dir)
    second = build(data, tiny.build_tokenizer(marked), cache_dir)
    assert [ids for ids, _ in examples(first)] == [ids for ids, _ in examples(second)]
    assert first.fingerprint != second.fingerprint


def test_selections_have_different_fingerprints(data, tokenizer, cache_dir):
    store = build(data, tokenizer, cache_dir)
    parts = [Examples(store, np.array(numbers)).fingerprint for numbers in ([0, 1, 2, 3], [0, 1, 2], [0, 0, 1, 2, 3])]
    assert len(set(parts)) == 3 and parts[0] == Examples(store, np.arange(4)).fingerprint
