"""The sizes of encoder-decoder models: for the memory estimate, and for the operations of their matrix products.

A token passes one of the two stacks: a source token the encoder, a target token the decoder. The decoder's attention to
the source also makes keys and values of the source's tokens.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from sft_recipe.config.schema import DataConfig
from sft_recipe.models.dims import FP32, ModelDims
from sft_recipe.models.loading import OTHER_MODALITIES

# Keys and values that attention to the source makes, in the names of T5, BART and T5Gemma.
OF_SOURCE = re.compile(r"(EncDecAttention|encoder_attn|cross_attn)\.(k|v|k_proj|v_proj)\.")
OF_BOTH = re.compile(r"decoder\..*self_attn\.(k_proj|v_proj)\.")  # of T5Gemma 2, which attends to both at once


@dataclass(frozen=True)
class Seq2SeqDims(ModelDims):
    """The sizes of the larger of the two stacks, which the memory estimate counts for all tokens.

    `scores` is the number of tokens that each token saves attention scores for, in each of two attentions; 0 where
    attention recomputes them. `target_share` is the part of a micro-batch's tokens that are targets, which have logits.
    """

    scores: int = 0
    target_share: float = 0.5

    @classmethod
    def of_model(cls, config: PretrainedConfig, data: DataConfig, attention: str) -> "Seq2SeqDims | None":
        """Read the sizes from a model's configuration; returns None where it lacks one."""
        stacks = [stack for name in ("encoder", "decoder") if (stack := _stack(config, name))]
        if len(stacks) < 2 or data.max_target_length is None:
            return None
        larger = max(stacks, key=lambda stack: stack.layers * stack.intermediate)
        return cls(
            **vars(larger),
            scores=max(data.max_length, data.max_target_length) if attention == "eager" else 0,
            target_share=data.max_target_length / (data.max_length + data.max_target_length),
        )

    def activation_bytes_per_token(self, width: int, on_cpu: bool, is_unsharded: bool) -> int:
        """Return the bytes that a layer saves for each token: a decoder's, and attention to the source."""
        layer = super().activation_bytes_per_token(width, on_cpu, is_unsharded)
        attention = self._norm(self.hidden, width, on_cpu) + width * (self.hidden + 2 * self.query + 2 * self.key)
        scores = FP32 + (width if width != FP32 else 0)  # the softmax in fp32, and in the dtype of the values
        return layer + attention + 2 * self.heads * self.scores * scores

    def head_bytes(self, tokens: int, width: int, on_cpu: bool, logits: int, is_trained: bool = True) -> int:
        """Return the bytes of head and loss: all logits of the targets exist, and once more in fp32 with a gradient."""
        targets = int(tokens * self.target_share)
        return targets * self.vocabulary * (2 * width + 2 * FP32) + width * self.vocabulary * self.hidden * is_trained


@dataclass(frozen=True)
class Seq2SeqMatmulParams:
    """Counts weights in matrix products with source tokens, with target tokens, and of the head.

    `adapted_source` and `adapted_target` count those of adapters; `encoder_attention` and `decoder_attention` are
    layers x heads x head size.
    """

    source: int
    target: int
    head: int
    adapted_source: int
    adapted_target: int
    encoder_attention: int
    decoder_attention: int

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> "Seq2SeqMatmulParams | None":
        """Count the weights of a model, with adapters or without; returns None where sizes are unknown."""
        encoder, decoder = (_stack(model.config, name) for name in ("encoder", "decoder"))
        weights = {
            name: weight
            for name, weight in model.named_parameters()
            if OTHER_MODALITIES.isdisjoint(name.split(".")) and weight.dim() > 1
        }
        if encoder is None or decoder is None or any(weight.dim() > 2 for weight in weights.values()):  # experts
            return None
        head = model.get_output_embeddings()
        ends = [part for part in model.modules() if isinstance(part, nn.Embedding)] + ([head] if head else [])
        outside, inside = {id(part.weight) for part in ends}, {id(weight) for weight in _encoder_weights(model)}
        reads_source = OF_SOURCE if any(map(OF_SOURCE.search, weights)) else OF_BOTH
        counts = {"source": 0, "target": 0, "adapted_source": 0, "adapted_target": 0}
        for name, weight in weights.items():
            if id(weight) in outside:
                continue
            prefix = "adapted_" if "lora_" in name else ""
            is_in_encoder = id(weight) in inside
            if is_in_encoder or reads_source.search(name):
                counts[f"{prefix}source"] += weight.numel()
            if not is_in_encoder and not OF_SOURCE.search(name):
                counts[f"{prefix}target"] += weight.numel()
        return cls(
            head=decoder.hidden * decoder.vocabulary,
            encoder_attention=encoder.layers * encoder.query,
            decoder_attention=decoder.layers * decoder.query,
            **counts,
        )

    def step_flops(self, lengths: np.ndarray, supervised: np.ndarray) -> float:
        """Return the operations of forward and backward passes for examples of these lengths, targets supervised."""
        sources, targets = lengths - supervised, supervised
        passes = 4 if self.adapted_source or self.adapted_target else 6
        weights = passes * (self.source * sources.sum() + (self.target + self.head) * targets.sum())
        weights += 6 * (self.adapted_source * sources.sum() + self.adapted_target * targets.sum())
        pairs = (targets * (targets + 1) // 2 + targets * sources).sum()
        attention = self.encoder_attention * (sources * sources).sum() + self.decoder_attention * pairs
        return float(weights + 12 * attention)


def _encoder_weights(model: Any) -> list[nn.Parameter]:
    return list(model.get_encoder().parameters())


def _stack(config: PretrainedConfig, name: str) -> ModelDims | None:
    """The sizes of the encoder or the decoder, whose configurations are separate, or named as in T5 or in BART."""
    inner = getattr(config, name, None)
    if isinstance(inner, PretrainedConfig):
        return ModelDims.of(inner.to_dict())
    settings = config.to_dict()
    if "d_kv" in settings:
        layers = {"encoder": "num_layers", "decoder": "num_decoder_layers"}[name]
        keys = layers, "d_ff", "num_heads"
    else:
        keys = f"{name}_layers", f"{name}_ffn_dim", f"{name}_attention_heads"
    sizes = [
        size for key in (*keys, "d_model", "vocab_size") if isinstance(size := settings.get(key), int) and size > 0
    ]
    if len(sizes) < 5:
        return None
    depth, intermediate, heads, hidden, vocabulary = sizes
    query = heads * settings.get("d_kv", hidden // heads)
    return ModelDims(depth, hidden, intermediate, vocabulary, heads, query, key=query)
