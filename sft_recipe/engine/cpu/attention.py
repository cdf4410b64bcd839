"""Attention over packed documents on CPUs: chooses the kernel. Imported on CPUs only."""

from collections.abc import Sequence

import torch

from sft_recipe.engine.attention.prefix_sharing import Segment
from sft_recipe.engine.cpu.blockwise_attention import attend_blockwise
from sft_recipe.engine.cpu.flash_attention import attend_flash, supports_flash


def attend_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Sequence[Segment],
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Causal attention of each segment to itself and to its prefix.

    query (1, heads, tokens, size), key and value (1, groups, tokens, size); a token sees `window` tokens, itself among
    them, or all where that is None. Returns (1, tokens, heads, size of the values).
    """
    if window is None and supports_flash(query, key, value):
        return attend_flash(query, key, value, segments, scale)
    return attend_blockwise(query, key, value, segments, window, scale)
