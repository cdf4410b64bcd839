"""Attention over packed documents that does no work between them: nowhere is there a mask of tokens x tokens.

transformers asks two registered functions: one makes the mask that a model hands to its layers, one attends. Here the
mask is a `Documents`, which only says where documents end, so a layer has all it needs at hand also when gradient
checkpointing runs it again.

    a a a | b b                segments of 3 and 2      a sees a, b sees b, each only what stands before it
    S S | a a a | b b          a and b continue S       a and b see S as well, as if each had its own
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, and_masks, packed_sequence_mask_function, sdpa_mask

from sft_recipe.engine.attention.prefix_sharing import Segment, concatenate
from sft_recipe.engine.cpu.blockwise_attention import attend_blockwise
from sft_recipe.engine.cpu.flash_attention import attend_flash, supports_flash
from sft_recipe.errors import ModelError

PACKED = "sft_packed"  # its name among transformers' attention implementations
HAS_VARLEN = "enable_gqa" in signature(varlen_attn).parameters  # since PyTorch 2.12
PROBED_ROWS = 64  # of a mask, to learn whether it is one of those we know

_segments: ContextVar[Sequence[Segment] | None] = ContextVar("the segments of the pack", default=None)
_known_masks: dict[tuple, bool] = {}
_log = logging.getLogger(__name__)


class PrefixSharingUnsupported(ModelError):
    """A mask that is not one of those we know cannot be made for documents that share their beginning."""


class Documents:
    """The segments of a pack, and how many tokens back (itself included) one sees; None: all."""

    def __init__(self, segments: Sequence[Segment], window: int | None, device: torch.device | str):
        self.segments = segments
        self.longest = max(segment.position + len(segment) for segment in segments)
        self.window = window if window is not None and window < self.longest else None
        self.device = device

    def __getattr__(self, name: str) -> Any:
        if hasattr(torch.Tensor, name) and not name.startswith("_"):
            raise ModelError(f"the model's own code takes {name!r} of its mask: set model.attn_implementation=sdpa")
        raise AttributeError(name)

    @cached_property
    def without_shared_prefixes(self) -> bool:
        """Whether each segment is a document."""
        return not any(segment.prefix for segment in self.segments)

    @cached_property
    def offsets(self) -> torch.Tensor:
        """Of each segment's first token, and of what follows the last; (segments + 1,)."""
        return self._offsets([len(segment) for segment in self.segments])

    @cached_property
    def key_offsets(self) -> torch.Tensor:
        """The same among the keys that segments see, what stands before each repeated with it."""
        return self._offsets([segment.position + len(segment) for segment in self.segments])

    @cached_property
    def key_rows(self) -> torch.Tensor:
        """Where those keys stand in the pack."""
        spans = [span for segment in self.segments for span in segment.keys(segment.end)]
        return torch.cat([torch.arange(span.start, span.stop) for span in spans]).to(self.device)

    @cached_property
    def number(self) -> torch.Tensor:
        """Each token's segment, 0 for the first; (tokens,)."""
        return torch.repeat_interleave(torch.tensor([len(segment) for segment in self.segments], device=self.device))

    @cached_property
    def mask(self) -> torch.Tensor:
        """(longest, longest): whether the row's token sees the column's; its corner is that of a shorter document."""
        mask = torch.ones(self.longest, self.longest, dtype=torch.bool, device=self.device).tril()
        return mask if self.window is None else mask.triu(1 - self.window)

    def _offsets(self, lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths], device=self.device).cumsum(0, dtype=torch.int32)


@contextmanager
def packed_documents(segments: Sequence[Segment]) -> Iterator[None]:
    """Models that are called inside take their (1, rows) inputs for a pack of these segments."""
    token = _segments.set(segments)
    try:
        yield
    finally:
        _segments.reset(token)


def best_attention(config: PretrainedConfig) -> str:
    """PACKED where the model takes its attention, and so its mask, from transformers' registry; else what it has."""
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if getattr(model_class, "_supports_attention_backend", False):
        return PACKED
    return "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"


def documents_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Documents | torch.Tensor | None:
    """What a model's layers get as their mask; a dense one outside `packed_documents` and where it is not known."""
    segments = _segments.get()
    rows = segments[-1].end if segments else None
    if segments and attention_mask is None and (batch_size, q_length, kv_length) == (1, rows, rows):
        documents = Documents(segments, local_size, device)
        if _is_known_mask(mask_function, documents, local_size, **kwargs):
            return documents
        if not documents.without_shared_prefixes:
            raise PrefixSharingUnsupported(
                "one of this model's masks is not known here: set model.share_prefixes=false"
            )
        # Not every model tells its mask of the packing.
        mask_function = and_masks(mask_function, packed_sequence_mask_function(documents.number[None]))
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(
        batch_size, q_length, kv_length, mask_function=mask_function, attention_mask=attention_mask,
        local_size=local_size, device=device, **kwargs,
    )  # fmt: skip


def _is_known_mask(
    mask_function: Callable, documents: Documents, local_size: int | None, use_vmap: bool = False, **kwargs: Any
) -> bool:
    """Whether within documents the model's mask is causal, over all that stands before or over a sliding window.

    A few rows of it tell; they are looked at once, for a GPU would have to be waited for.
    """
    is_local = local_size is not None and local_size < documents.segments[-1].end
    kind = (type(kwargs.get("config")), local_size, is_local, documents.window, use_vmap)
    if kind not in _known_masks:
        _known_masks[kind] = not use_vmap and _matches_causal_mask(mask_function, documents)
        if not _known_masks[kind]:
            _log.warning("Packed attention does not know one of this model's masks: that one is computed in full.")
    return _known_masks[kind]


def _matches_causal_mask(mask_function: Callable, documents: Documents) -> bool:
    number, device = documents.number, documents.device
    rows = torch.linspace(0, len(number) - 1, min(len(number), PROBED_ROWS), device=device).long()[:, None]
    columns = torch.arange(len(number), device=device)[None]
    expected = columns <= rows
    if documents.window is not None:
        expected &= rows - columns < documents.window
    zero = torch.zeros((), dtype=torch.long, device=device)
    found = mask_function(zero, zero, rows, columns)
    return bool(((found == expected) | (number[rows] != number[columns])).all())


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Documents | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """(1, heads, tokens, size) each, with fewer heads for key and value or as many; returns (1, tokens, heads, size).

    `softcap` bounds the scores, `s_aux` holds a score per head of an attention sink.
    """
    is_plain = softcap is None and s_aux is None
    if not isinstance(attention_mask, Documents):
        if is_plain:
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        mask = (
            attention_mask
            if attention_mask is not None
            else Documents(concatenate([query.shape[2]]).segments, None, query.device).mask
        )
        return _eager_attention(query, key, value, mask, dropout, scaling, softcap, s_aux).transpose(1, 2), None
    documents = attention_mask
    if is_plain and dropout == 0.0:
        if _supports_varlen(query, value):
            return _varlen(query, key, value, documents, scaling), None
        if query.device.type == "cpu":
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            if documents.window is None and supports_flash(query, key, value):
                return attend_flash(query, key, value, documents.segments, scale), None
            return attend_blockwise(query, key, value, documents.segments, documents.window, scale), None

    # split and cat, rather than slices, whose gradients would each be as long as the pack.
    lengths = [len(segment) for segment in documents.segments]
    queries, keys, values = (whole.split(lengths, dim=2) for whole in (query, key, value))
    keys_at, values_at = (
        dict(zip((segment.begin for segment in documents.segments), parts, strict=True)) for parts in (keys, values)
    )

    def attend_one(segment: Segment, query: torch.Tensor) -> torch.Tensor:
        begins = [part.begin for part in (*segment.prefix, segment)]
        key, value = (torch.cat([parts[begin] for begin in begins], dim=2) for parts in (keys_at, values_at))
        length = key.shape[2]
        mask = documents.mask[segment.position : length, :length]
        if not is_plain:
            return _eager_attention(query, key, value, mask, dropout, scaling, softcap, s_aux)
        is_causal = not segment.prefix and (documents.window is None or documents.window >= length)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=None if is_causal else mask, dropout_p=dropout, is_causal=is_causal,
            scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip

    parts = [attend_one(*part).transpose(1, 2) for part in zip(documents.segments, queries, strict=True)]
    return torch.cat(parts, dim=1), None


def _supports_varlen(query: torch.Tensor, value: torch.Tensor) -> bool:
    """What PyTorch's own FlashAttention asks for."""
    size = query.shape[-1]
    is_half = value.dtype in (torch.bfloat16, torch.float16)
    return HAS_VARLEN and query.is_cuda and is_half and size == value.shape[-1] and size % 8 == 0 and size <= 256


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scaling: float | None
) -> torch.Tensor:
    query, key, value = (whole[0].transpose(0, 1).to(value.dtype) for whole in (query, key, value))
    back = -1 if documents.window is None else documents.window - 1  # not counting the token itself
    offsets, longest = documents.offsets, documents.longest
    if not documents.without_shared_prefixes:
        key, value = (whole[documents.key_rows] for whole in (key, value))
    attended = varlen_attn(
        query, key, value, offsets, documents.key_offsets, longest, longest,
        scale=scaling, window_size=(back, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return attended[None]


def _eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention as the models' papers write it, softmax in fp32.

    Soft-capping: Gemma 2, https://arxiv.org/abs/2408.00118, section 2. A sink takes a share of the attention and gives
    nothing (gpt-oss, https://arxiv.org/abs/2508.10925, section 2.2).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (whole.repeat_interleave(groups, dim=1) for whole in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    probs = scores.softmax(-1)[..., : key.shape[2]].to(query.dtype)
    return F.dropout(probs, dropout) @ value


AttentionInterface.register(PACKED, attend)
AttentionMaskInterface.register(PACKED, documents_mask)
