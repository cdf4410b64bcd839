"""Attention for CPUs that compute in fp32: PyTorch's FlashAttention kernel for them, on a pack as it lies.

Each segment attends to itself with a causal mask. Rows that continue a segment then see it whole, all in one call, and
what the two calls give is weighed by their log-sum-exps. In the backward each call gets the log-sum-exp of both, so
that its shares of the attention are those of all keys (https://arxiv.org/abs/2205.14135, section 3.1 and algorithm 4).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sft_recipe.engine.attention.prefix_sharing import Segment

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def supports_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """What the kernel asks for, and the numbers with which it is faster than engine/cpu/blockwise_attention.py."""
    fit = all(whole.dtype == torch.float32 and whole.stride(-1) == 1 for whole in (query, key, value))
    return query.device.type == "cpu" and fit and query.shape[-1] == value.shape[-1]


def attend_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Sequence[Segment], scale: float
) -> torch.Tensor:
    """Causal attention of each segment to itself and to what stands before it.

    query (1, heads, tokens, size), key and value (1, groups, tokens, size). Returns (1, tokens, heads, size).
    """
    return _Flash.apply(query, key, value, segments, scale)


class _Flash(torch.autograd.Function):
    """Inside, tensors are (groups, heads of a group, tokens, size), without a copy: groups are the kernel's batch."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Sequence[Segment],
        scale: float,
    ) -> torch.Tensor:
        inputs = _by_group(query, key, value)
        result = query.new_empty(query.transpose(1, 2).shape)
        attended = _rows_last(result, key.shape[1])
        sums = query.new_empty(inputs[0].shape[:3])
        for rows, keys, is_causal in _parts(segments):
            found, its_sums = _forward(*_cut(inputs, rows, keys), 0.0, is_causal, scale=scale)
            if is_causal:
                attended[:, :, rows], sums[:, :, rows] = found, its_sums
            else:
                so_far = sums[:, :, rows]
                attended[:, :, rows].lerp_(found, torch.sigmoid(its_sums - so_far)[..., None])
                torch.logaddexp(so_far, its_sums, out=so_far)
        ctx.save_for_backward(query, key, value, result, sums)
        ctx.rest = segments, scale
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, result, sums = ctx.saved_tensors
        segments, scale = ctx.rest
        inputs = _by_group(query, key, value)
        upstream, attended = (_rows_last(whole, key.shape[1]) for whole in (gradients[0].contiguous(), result))
        found = [torch.empty_like(whole) for whole in (query, key, value)]
        for_query, for_key, for_value = found[0][0].unflatten(0, (key.shape[1], -1)), found[1][0], found[2][0]
        for rows, keys, is_causal in _parts(segments):
            of_query, of_key, of_value = _backward(
                upstream[:, :, rows], *_cut(inputs, rows, keys), attended[:, :, rows], sums[:, :, rows], 0.0, is_causal,
                scale=scale,
            )  # fmt: skip
            put = torch.Tensor.copy_ if is_causal else torch.Tensor.add_
            put(for_query[:, :, rows], of_query)
            put(for_key[:, keys], of_key.sum(1))
            put(for_value[:, keys], of_value.sum(1))
        return *found, None, None


def _parts(segments: Sequence[Segment]) -> Iterator[tuple[slice, slice, bool]]:
    """Rows, the keys that they see, and whether under a causal mask; first of all segments themselves.

    What continues a segment stands right after it (engine/attention/prefix_sharing.py).
    """
    ends: dict[tuple[int, int], int] = {}  # not by segments: each one's hash is of all those before it, again and again
    for segment in segments:
        yield (own := slice(segment.begin, segment.end)), own, True
        ends |= {(part.begin, part.end): segment.end for part in segment.prefix}
    for (begin, stop), end in ends.items():
        yield slice(stop, end), slice(begin, stop), False


def _by_group(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query = query[0].unflatten(0, (key.shape[1], -1))
    return query, *(whole[0][:, None].expand(-1, query.shape[1], -1, -1) for whole in (key, value))


def _rows_last(whole: torch.Tensor, groups: int) -> torch.Tensor:
    """(1, tokens, heads, size) -> (groups, heads of a group, tokens, size)."""
    return whole[0].unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _cut(inputs: Sequence[torch.Tensor], rows: slice, keys: slice) -> tuple[torch.Tensor, ...]:
    query, key, value = inputs
    return query[:, :, rows], key[:, :, keys], value[:, :, keys]
