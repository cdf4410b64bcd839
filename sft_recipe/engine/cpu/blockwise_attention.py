"""Attention for CPUs, in matrix products of a few hundred rows at a time.

PyTorch's kernel for CPUs multiplies bf16 in its own way, slowly where documents are short. Here each block of rows
meets all the keys that it sees at once, so an ordinary softmax will do, and the matrix products are oneDNN's. The
backward computes the scores again, as FlashAttention does (https://arxiv.org/abs/2205.14135, section 3.1).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch

from sft_recipe.engine.attention.prefix_sharing import Segment

ROWS = 192  # of a segment at a time: few enough that about half of what a causal mask hides is never computed


def attend_blockwise(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Sequence[Segment],
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Causal attention of each segment to itself and to what stands before it.

    query (1, heads, tokens, size), key and value (1, groups, tokens, size); a token sees `window` tokens, itself among
    them. Returns (1, tokens, heads, size of the values).
    """
    return _Blockwise.apply(query, key, value, segments, window, scale)


class _Blockwise(torch.autograd.Function):
    """Inside, the query heads of a group lie side by side: (groups, tokens x heads of a group, size)."""

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
        key, value = (whole[0].contiguous() for whole in (key, value))
        result = query.new_empty(*query.shape[:2], value.shape[2])
        for rows, keys in _blocks(segments, window):
            mine = slice(rows.start * heads, rows.stop * heads)
            probs = _probabilities(query[:, mine], _gather(key, keys), rows, window)
            result[:, mine] = probs @ _gather(value, keys)
        ctx.save_for_backward(query, key, value)
        ctx.rest = segments, window, scale
        return _by_head(result, heads)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        segments, window, scale = ctx.rest
        groups, heads = key.shape[0], query.shape[1] // key.shape[1]
        upstream = _by_group(gradients[0], groups)
        for_query = torch.empty_like(query)
        for_key, for_value = (torch.zeros_like(whole, dtype=torch.float32) for whole in (key, value))
        for rows, keys in _blocks(segments, window):
            mine = slice(rows.start * heads, rows.stop * heads)
            seen = _gather(key, keys)
            probs = _probabilities(query[:, mine], seen, rows, window)
            grad_probs = upstream[:, mine] @ _gather(value, keys).transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            for_query[:, mine] = grad_scores @ seen
            _scatter(for_key, keys, grad_scores.transpose(1, 2) @ query[:, mine])
            _scatter(for_value, keys, probs.transpose(1, 2) @ upstream[:, mine])
        for_query = _by_head(for_query, heads).transpose(1, 2).mul_(scale)
        return for_query, for_key.to(key.dtype)[None], for_value.to(value.dtype)[None], None, None, None


def _blocks(segments: Sequence[Segment], window: int | None) -> Iterator[tuple[slice, list[slice]]]:
    """Rows of one segment, and the rows of the keys that one of them sees, the last row's own last."""
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


def _gather(whole: torch.Tensor, spans: list[slice]) -> torch.Tensor:
    return whole[:, spans[0]] if len(spans) == 1 else torch.cat([whole[:, span] for span in spans], dim=1)


def _scatter(whole: torch.Tensor, spans: list[slice], parts: torch.Tensor) -> None:
    for span, part in zip(spans, parts.split([span.stop - span.start for span in spans], dim=1), strict=True):
        whole[:, span].add_(part)


def _by_group(whole: torch.Tensor, groups: int) -> torch.Tensor:
    """(1, tokens, heads, size) -> (groups, tokens x heads of a group, size)."""
    return whole[0].unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)


def _by_head(whole: torch.Tensor, heads: int) -> torch.Tensor:
    """And back."""
    return whole.unflatten(1, (-1, heads)).transpose(0, 1).flatten(1, 2)[None]
