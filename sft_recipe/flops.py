"""The arithmetic that training needs: floating point operations of matrix products, and nothing that is done twice."""

from dataclasses import dataclass

from sft_recipe.memory import Layout

FORMULA = """\
Share of the peak: operations of the matrix products that the trained tokens need / seconds / peak. The operations are
6 x (weights of the layers) x tokens + 6 x (weights of the head) x supervised tokens + 12 x layers x heads x (size of a
head) x pairs; pairs are n (n + 1) / 2 for each document of n tokens. With LoRA the frozen weights count 4 instead of 6
(they have no gradient), and 6 x (weights of the adapters) x tokens is added."""


@dataclass(frozen=True)
class Products:
    """Weights in matrix products: of all layers, of the head, of all adapters; and layers x heads x head size."""

    layers: int
    head: int
    adapters: int
    attention: int

    @classmethod
    def of(cls, layout: Layout, adapters: int = 0) -> "Products":
        """`adapters` is their number of weights, 0 for full fine-tuning."""
        layers = layout.layers * sum(left * right for left, right in of_layer(layout))
        return cls(layers, layout.hidden * layout.vocabulary, adapters, layout.layers * layout.query)

    def flops(self, tokens: float, supervised: float, pairs: float) -> float:
        """Of forward and backward passes together."""
        passes = 4 if self.adapters else 6
        weights = passes * (self.layers * tokens + self.head * supervised) + 6 * self.adapters * tokens
        return weights + 12 * self.attention * pairs


def of_layer(layout: Layout) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's linear maps: query, key, value, output; gate, up, down."""
    hidden, query, key, inner = layout.hidden, layout.query, layout.key, layout.intermediate
    attention = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]
