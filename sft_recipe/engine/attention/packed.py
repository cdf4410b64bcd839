"""Attention over packed documents, registered with transformers: no work between documents, no mask of tokens x tokens.

transformers calls two registered functions: `documents_mask` makes the mask that a model passes to its layers, and
`attend` computes the attention. See documents.py for how the documents reach them.

    a a a | b b                segments of 3 and 2      tokens of a see a, tokens of b see b, each up to itself
    S S | a a a | b b          a and b continue S       tokens of a and of b see S as well
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, and_masks, packed_sequence_mask_function, sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from verl.utils.ulysses import (
    gather_heads_scatter_seq,
    gather_seq_scatter_heads,
    get_ulysses_sequence_parallel_rank,
)

from sft_recipe.config.auto import PACKED_ATTENTION, flash_attention_runs
from sft_recipe.engine import patches
from sft_recipe.engine.attention.documents import DocumentMask, MaskUnsupported, PackedDocuments
from sft_recipe.engine.attention.prefix_sharing import Segment, concatenate

HAS_VARLEN = "enable_gqa" in signature(varlen_attn).parameters  # since PyTorch 2.12
PROBED_ROWS = 64  # of a mask, which show whether it is one of the known kinds

_known_masks: dict[tuple, bool] = {}
_log = logging.getLogger(__name__)


def best_attention(config: PretrainedConfig) -> str:
    """The fastest attention that the model supports: PACKED_ATTENTION where it uses transformers' registry."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        return "sdpa"
    if model_class.is_backend_compatible():
        return PACKED_ATTENTION
    return "sdpa" if patches.supports_sdpa(model_class) else "eager"


def supported_attention(config: PretrainedConfig) -> str:
    """The attention that `config` names, or the best one where the model or this GPU does not support it."""
    chosen, best = patches.attention_implementation(config), best_attention(config)
    if chosen == PACKED_ATTENTION != best:
        _log.warning("%s has its own attention code: packed documents are isolated by masks.", config.model_type)
        return best
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if chosen.startswith("flash_attention") and model_class:
        text: Any = config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if not patches.supports_flash_attention(model_class, chosen):
            _log.warning("%s does not support %s: using %s.", config.model_type, chosen, best)
            return best
        if not flash_attention_runs(chosen, size):
            return best
    return chosen


def attention_inputs(
    model: PreTrainedModel, segments: Sequence[Segment], device: torch.device, ranks: int = 1
) -> dict[str, Any]:
    """What the forward of `model` takes besides the positions, so that documents are isolated.

    `ranks` share the pack. FlashAttention gets the borders of the documents: transformers would find them in the
    positions again in each layer, which waits for the GPU each time.
    """
    chosen = patches.attention_implementation(model.config)
    if chosen == PACKED_ATTENTION:
        return {"attention_mask": PackedDocuments(segments, ranks)}
    if not chosen.startswith("flash_attention") or ranks > 1 or not _takes_any_argument(type(model).forward):
        return {}
    documents = DocumentMask(segments, None, device)
    offsets, longest = documents.offsets, documents.longest
    return dict(cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=longest, max_length_k=longest)


def _takes_any_argument(function: Callable) -> bool:
    return any(each.kind is each.VAR_KEYWORD for each in signature(function).parameters.values())


def documents_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable,
    attention_mask: torch.Tensor | PackedDocuments | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> DocumentMask | torch.Tensor | None:
    """The mask that a model passes to its layers; `attention_mask` is the one that the model was called with.

    A tensor where that is not a PackedDocuments, and where the model's `mask_function` is of an unknown kind. Raises
    MaskUnsupported where documents share prefixes and the kind is unknown.
    """
    if isinstance(attention_mask, PackedDocuments):
        if (batch_size, q_length, kv_length) != (1, *attention_mask.shape[1:] * 2):
            raise MaskUnsupported("the model changes the number of tokens before its attention")
        documents = DocumentMask(attention_mask.segments, local_size, device, attention_mask.ranks)
        if _is_known_mask(mask_function, documents, local_size, **kwargs):
            return documents
        if documents.ranks > 1:
            raise MaskUnsupported(
                "one of the model's masks is of an unknown kind, so that ranks cannot share a sequence"
            )
        if not documents.without_shared_prefixes:
            raise MaskUnsupported("one of the model's masks is of an unknown kind, so that prefixes cannot be shared")
        mask_function = and_masks(
            _at_positions(mask_function, documents), packed_sequence_mask_function(documents.number[None])
        )
        kwargs["allow_is_causal_skip"] = False
        attention_mask = None
    return sdpa_mask(
        batch_size, q_length, kv_length, mask_function=mask_function, attention_mask=attention_mask,
        local_size=local_size, device=device, **kwargs,
    )  # fmt: skip


def _at_positions(mask_function: Callable, documents: DocumentMask) -> Callable:
    """The mask at the positions that tokens have in their documents: the borders of chunks are counted from there."""
    begins = torch.tensor([segment.begin for segment in documents.segments], device=documents.device)
    position = torch.arange(len(documents.number), device=documents.device) - begins[documents.number]
    return lambda batch, head, row, column: mask_function(batch, head, position[row], position[column])


def _is_known_mask(
    mask_function: Callable, documents: DocumentMask, local_size: int | None, use_vmap: bool = False, **kwargs: Any
) -> bool:
    """Whether within documents the model's mask is causal, over all earlier tokens or over a sliding window.

    Some of its rows are compared, once for each kind: comparing them waits for a GPU.
    """
    is_local = local_size is not None and local_size < documents.segments[-1].end
    kind = (type(kwargs.get("config")), local_size, is_local, documents.window, use_vmap)
    if kind not in _known_masks:
        _known_masks[kind] = not use_vmap and _matches_causal_mask(mask_function, documents)
        if not _known_masks[kind]:
            _log.warning("One of this model's masks is of an unknown kind: it is computed for all pairs of tokens.")
    return _known_masks[kind]


def _matches_causal_mask(mask_function: Callable, documents: DocumentMask) -> bool:
    """Compares rows of the mask of one document as long as the longest."""
    size, device = documents.longest, documents.device
    rows = torch.linspace(0, size - 1, min(size, PROBED_ROWS), device=device).long()[:, None]
    columns = torch.arange(size, device=device)[None]
    expected = columns <= rows
    if documents.window is not None:
        expected &= rows - columns < documents.window
    zero = torch.zeros((), dtype=torch.long, device=device)
    return bool((mask_function(zero, zero, rows, columns) == expected).all())


@torch.compiler.disable  # it depends on the documents, which differ between micro-batches
def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: DocumentMask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a layer, as transformers calls it; no attention weights are returned.

    query (1, heads, tokens, size), key and value with as many heads or fewer; returns (1, tokens, heads, size).
    `softcap` bounds the scores, `s_aux` holds a score per head of an attention sink.
    """
    is_plain = softcap is None and s_aux is None
    if not isinstance(attention_mask, DocumentMask):
        if is_plain:
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        mask = attention_mask
        if mask is None:
            mask = DocumentMask(concatenate([query.shape[2]]).segments, None, query.device).mask
        return _eager_attention(query, key, value, mask, dropout, scaling, softcap, s_aux).transpose(1, 2), None
    documents = attention_mask
    if documents.ranks > 1 and query.shape[2] < documents.segments[-1].end:
        settings = dict(dropout=dropout, scaling=scaling, softcap=softcap, s_aux=s_aux, **kwargs)
        return _attend_over_ranks(module, query, key, value, documents, **settings), None
    if is_plain and dropout == 0.0:
        if _supports_varlen(query, value):
            return _varlen(query, key, value, documents, scaling), None
        if _is_blockwise_faster(query, key, value):
            from sft_recipe.engine.cpu.blockwise_attention import attend_blockwise  # only on CPUs: see patches.py

            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return attend_blockwise(query, key, value, documents.segments, documents.window, scale), None

    def attend_one(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, is_causal: bool
    ) -> torch.Tensor:
        if not is_plain:
            return _eager_attention(query, key, value, mask, dropout, scaling, softcap, s_aux)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=None if is_causal else mask, dropout_p=dropout, is_causal=is_causal,
            scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip

    return _attend_per_segment(attend_one, query, key, value, documents), None


def _attend_over_ranks(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: DocumentMask,
    s_aux: torch.Tensor | None,
    **settings: Any,
) -> torch.Tensor:
    """Ulysses (https://arxiv.org/abs/2309.14509): exchange rows of all heads for all rows of some heads, and back."""
    repeats = max(1, documents.ranks // key.shape[1])  # each rank needs a head of the keys
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    query, key, value = (gather_seq_scatter_heads(tensor, seq_dim=2, head_dim=1) for tensor in (query, key, value))
    if s_aux is not None:
        s_aux = s_aux.chunk(documents.ranks)[get_ulysses_sequence_parallel_rank()]
    attended, _ = attend(module, query, key, value, documents, s_aux=s_aux, **settings)
    return gather_heads_scatter_seq(attended, head_dim=2, seq_dim=1)


def _attend_per_segment(
    attend_one: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: DocumentMask,
) -> torch.Tensor:
    """Call `attend_one` with query, key, value and mask of each segment and its prefix."""
    # split and cat, rather than slices, whose gradients would each be as long as the pack.
    lengths = [len(segment) for segment in documents.segments]
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    begins = [segment.begin for segment in documents.segments]
    keys_at, values_at = (dict(zip(begins, parts, strict=True)) for parts in (keys, values))
    results = []
    for segment, part in zip(documents.segments, queries, strict=True):
        visible = [piece.begin for piece in (*segment.prefix, segment)]
        key, value = (torch.cat([parts[begin] for begin in visible], dim=2) for parts in (keys_at, values_at))
        length = key.shape[2]
        mask = documents.mask[segment.position : length, :length]
        is_causal = not segment.prefix and (documents.window is None or documents.window >= length)
        results.append(attend_one(part, key, value, mask, is_causal).transpose(1, 2))
    return torch.cat(results, dim=1)


def _is_blockwise_faster(*tensors: torch.Tensor) -> bool:
    """Return whether engine/cpu/blockwise_attention.py is faster than PyTorch's attention: on CPUs, but in fp32."""
    return all(tensor.is_cpu for tensor in tensors) and any(tensor.dtype != torch.float32 for tensor in tensors)


def _supports_varlen(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether PyTorch's FlashAttention for documents takes these tensors, on a GPU since Ampere, or of AMD."""
    size = query.shape[-1]
    is_half = value.dtype in (torch.bfloat16, torch.float16)
    fits = is_half and size == value.shape[-1] and size % 8 == 0 and size <= 256
    if not (HAS_VARLEN and query.is_cuda and fits):
        return False
    if torch.version.hip:
        return _runs_varlen(query.device, size)
    return torch.cuda.get_device_capability(query.device)[0] >= 8


@lru_cache
def _runs_varlen(device: torch.device, size: int) -> bool:
    """Whether it runs with a window and grouped heads, forward and backward: not all builds for ROCm have them."""
    half: dict[str, Any] = dict(dtype=torch.float16, device=device, requires_grad=True)
    query, key = (torch.ones(16, heads, size, **half) for heads in (2, 1))
    offsets = torch.tensor([0, 8, 16], dtype=torch.int32, device=device)
    try:
        with torch.enable_grad():
            attended: Any = varlen_attn(query, key, key, offsets, offsets, 8, 8, window_size=(3, 0), enable_gqa=True)
            attended.sum().backward()
        torch.cuda.synchronize(device)
        return True
    except Exception as error:
        _log.warning("PyTorch's FlashAttention does not run on this GPU: %s. Attention is slower.", error)
        return False


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: DocumentMask, scaling: float | None
) -> torch.Tensor:
    query, key, value = (tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value))
    back = -1 if documents.window is None else documents.window - 1  # not counting the token itself
    offsets, longest = documents.offsets, documents.longest
    if not documents.without_shared_prefixes:
        key, value = key[documents.key_rows], value[documents.key_rows]
    attended: Any = varlen_attn(
        query, key, value, offsets, documents.key_offsets, longest, longest,
        scale=scaling, window_size=(back, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return attended.unsqueeze(0)


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
    """Attention as in the models' papers, softmax in fp32.

    Soft-capping: Gemma 2, https://arxiv.org/abs/2408.00118, section 2. A sink takes part in the softmax and has no
    value (gpt-oss, https://arxiv.org/abs/2508.10925, section 2.2).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
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


AttentionInterface.register(PACKED_ATTENTION, attend)
AttentionMaskInterface.register(PACKED_ATTENTION, documents_mask)
