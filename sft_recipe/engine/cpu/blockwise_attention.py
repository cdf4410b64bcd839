"""Attention for CPUs, in matrix products of a few hundred rows at a time.

PyTorch's attention kernel for CPUs is slow in bf16 where documents are short. Here a block of rows is multiplied with
all the keys that it sees at once: an ordinary softmax is enough, and oneDNN computes the matrix products. The backward
pass computes the scores again, as FlashAttention does (https://arxiv.org/abs/2205.14135, section 3.1).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch

from sft_recipe.engine import patches
from sft_recipe.engine.attention.prefix_sharing import Segment

ROWS = 192  # of a segment at a time: small enough to skip about half of what a causal mask hides

_softmax_backward = patches.softmax_backward()


def attend_blockwise(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Sequence[Segment],
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Causal attention of each segment to itself and to its prefix.

    query (1, heads, tokens, size), key and value (1, groups, tokens, size); a token sees `window` tokens, itself among
    them. Returns (1, tokens, heads, size of the values).
    """
    return _Blockwise.apply(query, key, value, segments, window, scale)


class _Blockwise(torch.autograd.Function):
    """Inside, queries are (groups, tokens x heads of a group, size): the heads of a group are adjacent."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Sequence[Segment],
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        groups, heads = key.shape[1], query.shape[1] // key.shape[1]
        query = _by_group(query.transpose(1, 2), groups) * scale
        key, value = key[0].contiguous(), value[0].contiguous()
        result = query.new_empty(*query.shape[:2], value.shape[2])
        for rows, keys in _blocks(segments, window):
            block = slice(rows.start * heads, rows.stop * heads)
            probs = _probabilities(query[:, block], _gather(key, keys), rows, window)
            result[:, block] = probs @ _gather(value, keys)
        ctx.save_for_backward(query, key, value)
        ctx.settings = segments, window, scale
        return _by_head(result, heads)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        segments, window, scale = ctx.settings
        groups, heads = key.shape[0], query.shape[1] // key.shape[1]
        upstream = _by_group(gradients[0], groups)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value))
        for rows, keys in _blocks(segments, window):
            block = slice(rows.start * heads, rows.stop * heads)
            visible = _gather(key, keys)
            probs = _probabilities(query[:, block], visible, rows, window)
            grad_probs = upstream[:, block] @ _gather(value, keys).transpose(1, 2)
            grad_scores = _softmax_backward(grad_probs, probs, -1, probs.dtype)
            grad_query[:, block] = grad_scores @ visible
            _scatter(grad_key, keys, grad_scores.transpose(1, 2) @ query[:, block])
            _scatter(grad_value, keys, probs.transpose(1, 2) @ upstream[:, block])
        grad_query = _by_head(grad_query, heads).transpose(1, 2).mul_(scale)
        return grad_query, grad_key.to(key.dtype)[None], grad_value.to(value.dtype)[None], None, None, None


def _blocks(segments: Sequence[Segment], window: int | None) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of rows of a segment, and the rows of the keys that any of them sees; the block's last row comes last."""
    for segment in segments:
        parts = -(-len(segment) // ROWS)
        size = -(-len(segment) // parts)
        for begin in range(segment.begin, segment.end, size):
            end = min(begin + size, segment.end)
            first = 0 if window is None else segment.position + begin - segment.begin - window + 1
            yield slice(begin, end), segment.keys(end, max(0, first))


def _probabilities(query: torch.Tensor, key: torch.Tensor, rows: slice, window: int | None) -> torch.Tensor:
    """The softmax of a block's scores (groups, rows x heads, keys); the last key is that of the last row."""
    scores = query @ key.transpose(1, 2)
    count = rows.stop - rows.start
    bias = _bias(count, count if window is None else key.shape[1], window, scores.dtype)
    scores.view(len(key), count, -1, key.shape[1])[..., -bias.shape[-1] :].add_(bias)
    return scores.softmax(-1)


@lru_cache(maxsize=64)
def _bias(rows: int, keys: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """(rows, 1, keys): 0 where a row sees the key, -inf elsewhere; the last `keys` keys up to that of the last row."""
    ahead = torch.arange(keys)[None] - torch.arange(keys - rows, keys)[:, None]
    is_hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
    return torch.zeros(rows, keys, dtype=dtype).masked_fill_(is_hidden, float("-inf"))[:, None]


def _gather(tensor: torch.Tensor, spans: list[slice]) -> torch.Tensor:
    return tensor[:, spans[0]] if len(spans) == 1 else torch.cat([tensor[:, span] for span in spans], dim=1)


def _scatter(tensor: torch.Tensor, spans: list[slice], parts: torch.Tensor) -> None:
    for span, part in zip(spans, parts.split([span.stop - span.start for span in spans], dim=1), strict=True):
        tensor[:, span].add_(part)


def _by_group(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """(1, tokens, heads, size) -> (groups, tokens x heads of a group, size)."""
    return tensor[0].unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)


def _by_head(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """(groups, tokens x heads of a group, size) -> (1, tokens, heads, size)."""
    return tensor.unflatten(1, (-1, heads)).transpose(0, 1).flatten(1, 2)[None]
