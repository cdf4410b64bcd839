"""Packs with shared beginnings against the documents that they were made of."""

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, TensorDict

from sft_recipe.engine.attention import prefix_sharing as packs
from sft_recipe.engine.attention.prefix_sharing import concatenate, share_prefixes
from sft_recipe.engine.cpu.platform import use_cpu


def random_documents(seed):
    """Some go on where others are, some are the same, some begin alike by chance."""
    random = np.random.default_rng(seed)
    documents = [random.integers(0, 2, random.integers(1, 9)) for _ in range(random.integers(1, 4))]
    for _ in range(random.integers(0, 12)):
        parent = documents[random.integers(len(documents))]
        begin = parent[: random.integers(0, len(parent) + 1)]
        documents.append(np.append(begin, random.integers(0, 3, random.integers(0 if len(begin) else 1, 9))))
    return [documents[place] for place in random.permutation(len(documents))]


def check(pack, documents):
    """Every document can be read off its rows, and each of its rows sees just the rows before it."""
    tokens = np.full(pack.segments[-1].end, -1)
    seen = {}
    for segment in pack.segments:
        for row in range(segment.begin, segment.end):
            seen[row] = [row for span in segment.keys(row + 1) for row in range(span.start, span.stop)]
            assert len(seen[row]) == segment.position + row - segment.begin + 1
    assert list(seen) == list(range(len(tokens)))  # each row is in one segment
    ends = np.cumsum([len(document) for document in documents])
    for document, end in zip(documents, ends, strict=True):
        rows = pack.rows[end - len(document) : end]
        assert ((tokens[rows] == -1) | (tokens[rows] == document)).all()
        tokens[rows] = document
        assert [seen[row] for row in rows] == [list(rows[: place + 1]) for place in range(len(rows))]
    assert -1 not in tokens


def shared(seed, shortest, monkeypatch):
    """Some random documents and a right pack of them, which shares nothing that is shorter."""
    monkeypatch.setattr(packs, "SHORTEST", shortest)
    documents = random_documents(seed)
    pack = share_prefixes(documents)
    check(pack, documents)
    return documents, pack


@pytest.mark.parametrize("seed", range(200))
def test_every_beginning_stands_once(seed, monkeypatch):
    documents, pack = shared(seed, 1, monkeypatch)
    beginnings = {tuple(document[: end + 1]) for document in documents for end in range(len(document))}
    assert pack.segments[-1].end == len(beginnings)


@pytest.mark.parametrize("seed", range(100))
def test_short_ones_stay_where_they_are(seed, monkeypatch):
    _, pack = shared(seed, 4, monkeypatch)
    assert all(len(prefix) >= 4 for segment in pack.segments for prefix in segment.prefix)


def test_nothing_in_common_is_side_by_side():
    documents = [np.array([1, 2, 3]), np.array([4]), np.array([2, 3])]
    plain = concatenate([3, 1, 2])
    check(plain, documents)
    assert sorted(map(len, share_prefixes(documents).segments)) == sorted(map(len, plain.segments)) == [1, 2, 3]


def test_a_window_leaves_out_the_first_keys():
    first = packs.Segment(0, 4)
    second = packs.Segment(4, 6, (first,))
    last = packs.Segment(9, 12, (first, second))
    assert last.position == 6
    assert last.keys(11) == [slice(0, 4), slice(4, 6), slice(9, 11)]
    assert last.keys(11, skipped=3) == [slice(3, 4), slice(4, 6), slice(9, 11)]
    assert last.keys(11, skipped=6) == [slice(9, 11)]
    assert last.keys(11, skipped=7) == [slice(10, 11)]


@pytest.mark.parametrize("shares", [False, True], ids=["side by side", "shared"])
def test_each_supervised_token_is_learnt_from_the_row_before_it_once_for_each_document(shares, monkeypatch):
    use_cpu()
    from sft_recipe.engine.sft_engine import _micro_batches

    monkeypatch.setattr(packs, "SHORTEST", 2)
    documents = [[5, 6, 7, 8], [5, 6, 7, 9, 9], [5, 6, 7, 8], [3]]
    masks = [[0, 0, 1, 1], [0, 0, 1, 0, 1], [0, 0, 0, 1], [1]]  # the last has nothing before it to learn it from
    parts = {"input_ids": documents, "loss_mask": masks, "position_ids": [list(range(len(ids))) for ids in documents]}
    tensors = {
        name: torch.nested.as_nested_tensor([torch.tensor(part) for part in of_name], layout=torch.jagged)
        for name, of_name in parts.items()
    }
    batch = TensorDict(tensors, batch_size=[4])
    batch["micro_batch_docs"] = NonTensorData([3, 1])
    (segments, ids, position_ids, positions, targets), (_, _, _, none, _) = _micro_batches(batch, shares)
    assert ids.shape == position_ids.shape == (1, 7 if shares else 13) and segments[-1].end == ids.shape[1]
    found = sorted(zip(ids[0, positions].tolist(), position_ids[0, positions].tolist(), targets.tolist(), strict=True))
    assert found == sorted([(6, 1, 7), (7, 2, 8), (6, 1, 7), (9, 3, 9), (7, 2, 8)])
    assert len(none) == 0
