"""Packs with shared prefixes against the documents that they were made from."""

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, TensorDict

from sft_recipe.engine.attention import prefix_sharing
from sft_recipe.engine.attention.prefix_sharing import Segment, concatenate, share_prefixes
from sft_recipe.engine.cpu.platform import use_cpu


def random_documents(seed):
    """Some continue others, some are equal, some share a prefix by chance."""
    random = np.random.default_rng(seed)
    documents = [random.integers(0, 2, random.integers(1, 9)) for _ in range(random.integers(1, 4))]
    for _ in range(random.integers(0, 12)):
        parent = documents[random.integers(len(documents))]
        begin = parent[: random.integers(0, len(parent) + 1)]
        documents.append(np.append(begin, random.integers(0, 3, random.integers(0 if len(begin) else 1, 9))))
    return [documents[index] for index in random.permutation(len(documents))]


def check(pack, documents):
    """Check that each document can be read from its rows, and that each row sees exactly the rows before it."""
    tokens = np.full(pack.segments[-1].end, -1)
    visible = {}
    for segment in pack.segments:
        for row in range(segment.begin, segment.end):
            visible[row] = [row for span in segment.keys(row + 1) for row in range(span.start, span.stop)]
            assert len(visible[row]) == segment.position + row - segment.begin + 1
    assert list(visible) == list(range(len(tokens)))  # each row is in one segment
    ends = np.cumsum([len(document) for document in documents])
    for document, end in zip(documents, ends, strict=True):
        rows = pack.rows[end - len(document) : end]
        assert ((tokens[rows] == -1) | (tokens[rows] == document)).all()
        tokens[rows] = document
        assert [visible[row] for row in rows] == [list(rows[: index + 1]) for index in range(len(rows))]
    assert -1 not in tokens


def shared(seed, shortest, monkeypatch):
    """Random documents and their pack, which is checked and shares no prefix shorter than `shortest`."""
    monkeypatch.setattr(prefix_sharing, "SHORTEST", shortest)
    documents = random_documents(seed)
    pack = share_prefixes(documents)
    check(pack, documents)
    return documents, pack


@pytest.mark.parametrize("seed", range(200))
def test_every_common_prefix_is_stored_once(seed, monkeypatch):
    documents, pack = shared(seed, 1, monkeypatch)
    prefixes = {tuple(document[: end + 1]) for document in documents for end in range(len(document))}
    assert pack.segments[-1].end == len(prefixes)


@pytest.mark.parametrize("seed", range(100))
def test_short_prefixes_are_not_shared(seed, monkeypatch):
    _, pack = shared(seed, 4, monkeypatch)
    assert all(len(prefix) >= 4 for segment in pack.segments for prefix in segment.prefix)


def test_documents_without_common_prefixes_are_concatenated():
    documents = [np.array([1, 2, 3]), np.array([4]), np.array([2, 3])]
    plain = concatenate([3, 1, 2])
    check(plain, documents)
    assert sorted(map(len, share_prefixes(documents).segments)) == sorted(map(len, plain.segments)) == [1, 2, 3]


def test_keys_can_skip_the_first_rows():
    first = Segment(0, 4)
    second = Segment(4, 6, (first,))
    last = Segment(9, 12, (first, second))
    assert last.position == 6
    assert last.keys(11) == [slice(0, 4), slice(4, 6), slice(9, 11)]
    assert last.keys(11, skipped=3) == [slice(3, 4), slice(4, 6), slice(9, 11)]
    assert last.keys(11, skipped=6) == [slice(9, 11)]
    assert last.keys(11, skipped=7) == [slice(10, 11)]


@pytest.mark.parametrize("shares", [False, True], ids=["separate", "shared"])
def test_each_supervised_token_is_predicted_from_the_row_before_it(shares, monkeypatch):
    use_cpu()
    from sft_recipe.engine.micro_batches import pack, planned_documents

    monkeypatch.setattr(prefix_sharing, "SHORTEST", 2)
    documents = [[5, 6, 7, 8], [5, 6, 7, 9, 9], [5, 6, 7, 8], [3]]
    masks = [[0, 0, 1, 1], [0, 0, 1, 0, 1], [0, 0, 0, 1], [1]]  # the last has no token before it to predict it from
    parts = {"input_ids": documents, "loss_mask": masks, "position_ids": [list(range(len(ids))) for ids in documents]}
    tensors = {
        name: torch.nested.as_nested_tensor([torch.tensor(part) for part in of_name], layout=torch.jagged)
        for name, of_name in parts.items()
    }
    batch = TensorDict(tensors, batch_size=[4])
    batch["micro_batch_docs"] = NonTensorData([3, 1])
    first, second = (pack(documents, shares) for documents in planned_documents(batch))
    ids, position_ids, positions = first.input_ids, first.position_ids, first.positions
    assert ids.shape == position_ids.shape == (1, 7 if shares else 13) and first.segments[-1].end == ids.shape[1]
    tokens_before, their_positions = ids[0, positions].tolist(), position_ids[0, positions].tolist()
    predictions = sorted(zip(tokens_before, their_positions, first.targets.tolist(), strict=True))
    assert predictions == sorted([(6, 1, 7), (7, 2, 8), (6, 1, 7), (9, 3, 9), (7, 2, 8)])
    assert len(second.positions) == 0
