"""The documents of a micro-batch in place of a mask of tokens x tokens.

The engine passes `PackedDocuments` to a model as its `attention_mask`. The model passes it to transformers' mask
functions, which call `packed.documents_mask`; that returns a `DocumentMask`, which the model passes to its layers. So
both travel as arguments, and a layer that gradient checkpointing runs again gets the same mask again.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NoReturn

import torch

from sft_recipe.engine.attention.prefix_sharing import Segment
from sft_recipe.errors import ModelError


class MaskUnsupported(ModelError):
    """The model's own code needs a mask of numbers, or one that cannot be made for documents that share a prefix."""


class _NotATensor:
    """Raises MaskUnsupported where a model treats this as the tensor that a mask usually is."""

    def __getattr__(self, name: str) -> Any:
        if hasattr(torch.Tensor, name) and not name.startswith("_"):
            self._refuse(name)
        raise AttributeError(name)

    def __getitem__(self, index: Any) -> NoReturn:
        self._refuse(f"[{index}]")

    def __eq__(self, other: object) -> bool:
        return self is other or self._refuse("==")

    __hash__ = object.__hash__

    def _refuse(self, name: str) -> NoReturn:
        raise MaskUnsupported(f"the model's own code uses {name!r} of its attention mask")


class PackedDocuments(_NotATensor):
    """The segments of a pack, as the `attention_mask` of a model.

    It has what transformers' mask functions read of a padding mask: two dimensions, (1, rows of this rank), `to`, and,
    to count the padding on the left, `cumsum` and `torch.zeros_like`; there is no padding. `ranks` share the pack, each
    with as many rows.
    """

    ndim = 2

    def __init__(self, segments: Sequence[Segment], ranks: int = 1):
        self.segments = segments
        self.ranks = ranks
        self.shape = (1, segments[-1].end // ranks)

    def to(self, *_args: Any, **_kwargs: Any) -> "PackedDocuments":
        return self

    def cumsum(self, dim: int) -> torch.Tensor:
        return torch.ones(self.shape, dtype=torch.long).cumsum(dim)

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: tuple = (), _kwargs: dict | None = None) -> Any:
        if function is not torch.zeros_like:
            raise MaskUnsupported(f"the model's own code passes its attention mask to {function.__name__!r}")
        return torch.zeros(args[0].shape, dtype=torch.long)


class DocumentMask(_NotATensor):
    """The segments of a pack, and how many tokens back (itself included) a token sees; None: all.

    `device` is where its tensors are made, each when it is first needed. Where several `ranks` share the pack, a
    layer's tensors have this rank's rows only, and the mask is that of all rows.
    """

    def __init__(self, segments: Sequence[Segment], window: int | None, device: torch.device | str, ranks: int = 1):
        self.segments = segments
        self.ranks = ranks
        self.longest = max(segment.position + len(segment) for segment in segments)
        self.window = window if window is not None and window < self.longest else None
        self.device = device

    @cached_property
    def without_shared_prefixes(self) -> bool:
        """Whether each segment is a complete document."""
        return not any(segment.prefix for segment in self.segments)

    @cached_property
    def offsets(self) -> torch.Tensor:
        """Row of each segment's first token, and the number of rows; (segments + 1,)."""
        return self._offsets([len(segment) for segment in self.segments])

    @cached_property
    def key_offsets(self) -> torch.Tensor:
        """The same among the keys that segments see, where the keys of a prefix are repeated for each segment."""
        return self._offsets([segment.position + len(segment) for segment in self.segments])

    @cached_property
    def key_rows(self) -> torch.Tensor:
        """Rows of those keys in the pack."""
        spans = [span for segment in self.segments for span in segment.keys(segment.end)]
        return self._on_device(torch.cat([torch.arange(span.start, span.stop) for span in spans]))

    @cached_property
    def number(self) -> torch.Tensor:
        """Each token's segment, 0 for the first; (tokens,)."""
        return self._on_device(torch.repeat_interleave(torch.tensor([len(segment) for segment in self.segments])))

    @cached_property
    def mask(self) -> torch.Tensor:
        """(longest, longest): whether the row's token sees the column's; a shorter document uses its upper left."""
        mask = torch.ones(self.longest, self.longest, dtype=torch.bool, device=self.device).tril()
        return mask if self.window is None else mask.triu(1 - self.window)

    def _offsets(self, lengths: list[int]) -> torch.Tensor:
        return self._on_device(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32))

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor from the host, which does not wait for what a GPU still computes."""
        return tensor.to(self.device, non_blocking=True)
