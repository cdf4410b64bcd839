"""The arithmetic that training needs: floating point operations of matrix products, and nothing that is done twice."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMULA = """\
Share of the peak: operations of the matrix products that the trained tokens need / seconds / peak. The operations are
6 x (weights of the layers) x tokens + 6 x (weights of the head) x supervised tokens + 12 x layers x heads x (size of a
head) x pairs; pairs are n (n + 1) / 2 for each document of n tokens. With LoRA the frozen weights count 4 instead of 6
(they have no gradient), and 6 x (weights of the adapters) x tokens is added."""


@dataclass(frozen=True)
class Shape:
    """Weights in matrix products: of all layers, of the head, of all adapters; and layers x heads x head size."""

    layers: int
    head: int
    adapters: int
    attention: int

    @classmethod
    def of(cls, config: Mapping[str, Any], lora_rank: int = 0) -> "Shape":
        """From a model's config.json (Llama, Qwen2), with adapters on all linear layers but the head."""
        hidden, inner, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads
        queries, keys = heads * size, config["num_key_value_heads"] * size
        products = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
        products += [(hidden, inner), (hidden, inner), (inner, hidden)]
        return cls(
            layers * sum(left * right for left, right in products),
            hidden * config["vocab_size"],
            layers * sum(lora_rank * (left + right) for left, right in products),
            layers * queries,
        )

    def flops(self, tokens: float, supervised: float, pairs: float) -> float:
        """Of forward and backward passes together."""
        passes = 4 if self.adapters else 6
        weights = passes * (self.layers * tokens + self.head * supervised) + 6 * self.adapters * tokens
        return weights + 12 * self.attention * pairs
