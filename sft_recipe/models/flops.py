"""Floating-point operations of the matrix products that training needs, recomputation not counted."""

from dataclasses import dataclass

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from sft_recipe.models.dims import ModelDims

FORMULA = """\
Share of the peak: operations of the matrix products that the trained tokens need / seconds / peak. The operations are
6 x (weights of the layers) x tokens + 6 x (weights of the head) x supervised tokens + 12 x layers x heads x (size of a
head) x pairs; pairs are n (n + 1) / 2 for each document of n tokens. With LoRA the frozen weights count 4 instead of 6
(they have no gradient), and 6 x (weights of the adapters) x tokens is added."""


@dataclass(frozen=True)
class MatmulParams:
    """Counts weights in matrix products (layers, head, adapters); `attention` is layers x heads x head size."""

    layers: int
    head: int
    adapters: int
    attention: int

    @classmethod
    def of(cls, dims: ModelDims, layers: int, adapters: int = 0) -> "MatmulParams":
        """Combine the dimensions with the numbers of weights in layers and adapters (0 for full fine-tuning)."""
        return cls(layers, dims.hidden * dims.vocabulary, adapters, dims.layers * dims.query)

    def step_flops(self, lengths: np.ndarray, supervised: np.ndarray) -> float:
        """Return the operations for documents of these lengths, with so many supervised tokens."""
        pairs = (lengths * (lengths + 1) // 2).sum()
        return self.flops(int(lengths.sum()), int(supervised.sum()), int(pairs))

    def flops(self, tokens: float, supervised: float, pairs: float) -> float:
        """Return the operations of forward and backward passes together; see FORMULA."""
        passes = 4 if self.adapters else 6
        weights = passes * (self.layers * tokens + self.head * supervised) + 6 * self.adapters * tokens
        return weights + 12 * self.attention * pairs


def matmul_params(model: PreTrainedModel, dims: ModelDims) -> int:
    """Count the weights of the layers that each token is multiplied with; of experts only those it is routed to."""
    ends = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    head = model.get_output_embeddings()
    if head is not None:
        ends.append(head)
    outside = {id(part.weight) for part in ends}
    found = 0
    for weight in model.parameters():
        if weight.dim() == 2 and id(weight) not in outside:
            found += weight.numel()
        elif weight.dim() == 3:  # (experts, inputs, outputs), or with those turned
            found += weight.numel() * dims.experts // weight.shape[0]
    return found
