"""The sizes of a model's layers, as its config.json states them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FP32 = 4  # bytes
# Logits that exist at the same time: few save memory, many make the matrix products efficient.
LOGITS_CHUNK = {"cpu": 2**25, "cuda": 2**28}


@dataclass(frozen=True)
class ModelDims:
    """The sizes that decide what a model saves for its backward pass; `query` and `key` count all heads together."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    query: int
    key: int
    has_head_norm: bool = False
    experts: int = 0  # per token
    is_gemma: bool = False  # norms compute in fp32 up to their result, and from Gemma 2 on a layer has four
    norms: int = 2  # of a layer, without those of heads

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "ModelDims | None":
        """Read the sizes from a model's config.json; returns None where it lacks one, or where layers differ."""
        settings = settings.get("text_config") or settings
        try:
            heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
            size = settings.get("head_dim") or hidden // heads
            experts = settings.get("num_experts_per_tok") or 0
            kind = settings.get("model_type", "")
            width = experts * (settings.get("moe_intermediate_size") or settings["intermediate_size"])
            found = cls(
                layers=settings["num_hidden_layers"],
                hidden=hidden,
                intermediate=width + (settings.get("shared_expert_intermediate_size") or 0) * (experts > 0)
                if experts
                else settings["intermediate_size"],
                vocabulary=settings["vocab_size"],
                heads=heads,
                query=heads * size,
                key=(settings.get("num_key_value_heads") or heads) * size,
                has_head_norm="qwen3" in kind or kind.startswith("gemma3"),
                experts=experts,
                is_gemma=kind.startswith("gemma"),
                norms=4 if kind.startswith(("gemma2", "gemma3")) else 2,
            )
        except (KeyError, TypeError):
            return None
        return found if all(isinstance(size, int) for size in vars(found).values()) else None

    def activation_bytes_per_token(self, width: int, on_cpu: bool, is_unsharded: bool) -> int:
        """Return the bytes that a layer saves for each token, where it computes in numbers of `width` bytes.

        `on_cpu` its norms and its MLP's product save their inputs only (engine/cpu/recompute.py), and its attention,
        but in fp32, saves what the scores are recomputed from (engine/cpu/blockwise_attention.py). In an unsharded
        model the linear layers do not save the outputs of these norms and of this product either
        (engine/cpu/unsharded.py).
        """
        norms = self.norms * self._norm(self.hidden, width, on_cpu)
        # Of the two norms before linear layers, which save them.
        outputs = 0 if is_unsharded and not self.is_gemma else 2 * width * self.hidden
        attention = width * (2 * self.query + 2 * self.key)  # q, out, k, v
        if not on_cpu or width == FP32:
            attention += width * self.query + FP32 * self.heads  # out packed; log-sum-exp
        head_norms = self._norm(self.query + self.key, width, on_cpu) if self.has_head_norm else 0
        mlp = (2 if is_unsharded else 3 if on_cpu else 4) * width * self.intermediate  # gate, up; product; activation
        return norms + outputs + attention + head_norms + mlp

    @property
    def copied_inputs(self) -> int:
        """Return how many numbers a layer saves more for each token where adapters in fp32 have FSDP1's own units.

        peft converts the inputs to fp32, and autocast each of them back: the projections share none. The adapters of
        query, key and value would share one, as would gate and up; what attention returns is saved by itself.
        """
        return 3 * self.hidden + self.query

    def head_bytes(self, tokens: int, width: int, on_cpu: bool, logits: int, is_trained: bool = True) -> int:
        """Return the bytes of embeddings, head and loss for `tokens`, with at most `logits` logits at the same time.

        They are: the last norm; the head's input and its gradient; a chunk of logits, which its gradient overwrites, on
        a CPU with the chunk before it; and the gradient of the head's weight where it `is_trained`, on a GPU with its
        sum in fp32 where there are several chunks.
        """
        each = self._norm(self.hidden, width, on_cpu) + 2 * width * self.hidden
        part = width * min(tokens * self.vocabulary, (1 + on_cpu) * logits)
        is_summed = not on_cpu and 0 < logits < tokens * self.vocabulary
        gradient = (2 * width + FP32 if is_summed else width) * self.vocabulary * self.hidden
        return tokens * each + part + gradient * is_trained

    def outside_layers(self, total: int) -> int:
        """Return about how many of `total` weights are embeddings and head, which are the same in some models."""
        layers = self.layers * self.hidden * (2 * self.query + 2 * self.key + 3 * self.intermediate)
        one = self.vocabulary * self.hidden
        return min(2 * one, max(one, total - layers))

    def _norm(self, size: int, width: int, on_cpu: bool) -> int:
        # The input; without recomputation the input in fp32, and the normalized input. Gemma's are not recomputed.
        if self.is_gemma:
            return 2 * FP32 * size
        return (width if on_cpu else FP32 + width) * size
