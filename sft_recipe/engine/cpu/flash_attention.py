"""Attention for CPUs that compute in fp32, with PyTorch's FlashAttention kernel for CPUs.

Each segment attends to itself with a causal mask. All rows that continue a segment then attend to it without a mask, in
one call, and the results of the two calls are weighted by their log-sum-exps. In the backward pass each call gets the
log-sum-exp of both, so that its softmax is over all keys (https://arxiv.org/abs/2205.14135, section 3.1, algorithm 4).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sft_recipe.engine import patches
from sft_recipe.engine.attention.prefix_sharing import Segment

_forward, _backward = patches.flash_attention_on_cpu()


def supports_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel takes these tensors and is faster than blockwise_attention.py: in fp32."""
    fits = all(tensor.dtype == torch.float32 and tensor.stride(-1) == 1 for tensor in (query, key, value))
    return query.device.type == "cpu" and fits and query.shape[-1] == value.shape[-1]


def attend_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Sequence[Segment], scale: float
) -> torch.Tensor:
    """Causal attention of each segment to itself and to its prefix.

    query (1, heads, tokens, size), key and value (1, groups, tokens, size). Returns (1, tokens, heads, size).
    """
    return _Flash.apply(query, key, value, segments, scale)


class _Flash(torch.autograd.Function):
    """Inside, tensors are views (groups, heads of a group, tokens, size): groups are the kernel's batch."""

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
            part, part_sums = _forward(*_slices(inputs, rows, keys), 0.0, is_causal, scale=scale)
            if is_causal:
                attended[:, :, rows], sums[:, :, rows] = part, part_sums
            else:
                so_far = sums[:, :, rows]
                attended[:, :, rows].lerp_(part, torch.sigmoid(part_sums - so_far)[..., None])
                torch.logaddexp(so_far, part_sums, out=so_far)
        ctx.save_for_backward(query, key, value, result, sums)
        ctx.settings = segments, scale
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, result, sums = ctx.saved_tensors
        segments, scale = ctx.settings
        inputs = _by_group(query, key, value)
        upstream, attended = (_rows_last(tensor, key.shape[1]) for tensor in (gradients[0].contiguous(), result))
        totals = [torch.empty_like(tensor) for tensor in (query, key, value)]
        grad_query, grad_key, grad_value = totals[0][0].unflatten(0, (key.shape[1], -1)), totals[1][0], totals[2][0]
        for rows, keys, is_causal in _parts(segments):
            part_query, part_key, part_value = _backward(
                upstream[:, :, rows], *_slices(inputs, rows, keys), attended[:, :, rows], sums[:, :, rows], 0.0,
                is_causal, scale=scale,
            )  # fmt: skip
            write = torch.Tensor.copy_ if is_causal else torch.Tensor.add_
            write(grad_query[:, :, rows], part_query)
            write(grad_key[:, keys], part_key.sum(1))
            write(grad_value[:, keys], part_value.sum(1))
        return *totals, None, None


def _parts(segments: Sequence[Segment]) -> Iterator[tuple[slice, slice, bool]]:
    """Rows, the keys that they see, and whether with a causal mask; all segments with themselves come first.

    The rows that continue a segment are directly after it (engine/attention/prefix_sharing.py).
    """
    ends: dict[tuple[int, int], int] = {}  # keyed by rows, since the hash of a segment includes those of its prefix
    for segment in segments:
        yield (own := slice(segment.begin, segment.end)), own, True
        ends |= {(part.begin, part.end): segment.end for part in segment.prefix}
    for (begin, stop), end in ends.items():
        yield slice(stop, end), slice(begin, stop), False


def _by_group(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query = query[0].unflatten(0, (key.shape[1], -1))
    return query, *(tensor[0][:, None].expand(-1, query.shape[1], -1, -1) for tensor in (key, value))


def _rows_last(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """(1, tokens, heads, size) -> (groups, heads of a group, tokens, size)."""
    return tensor[0].unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _slices(inputs: Sequence[torch.Tensor], rows: slice, keys: slice) -> tuple[torch.Tensor, ...]:
    query, key, value = inputs
    return query[:, :, rows], key[:, :, keys], value[:, :, keys]
