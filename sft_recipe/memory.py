"""How much memory a rank's device needs, from the numbers of a model: whether activations must be recomputed.

What autograd keeps of a decoder layer is counted as in Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198,
section 4, for today's layers: no scores of tokens x tokens, RMSNorm, grouped key and value heads, a gated MLP.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft_recipe.config import Config

FP32 = 4  # bytes
USABLE = 0.9  # of a device's memory: the rest goes to its runtime, to buffers of collectives, and to gaps
GIB = 2**30


@dataclass(frozen=True)
class Layout:
    """The sizes that decide what a model keeps for its backward pass; widths are of all heads together."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    query: int
    key: int
    has_head_norm: bool = False
    experts: int = 0  # that each token is sent to

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Layout | None":
        """From a model's config.json; None where it does not tell, as of other architectures or layers that differ."""
        settings = settings.get("text_config") or settings
        try:
            heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
            size = settings.get("head_dim") or hidden // heads
            experts = settings.get("num_experts_per_tok") or 0
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
                has_head_norm="qwen3" in settings.get("model_type", ""),
                experts=experts,
            )
        except (KeyError, TypeError):
            return None
        return found if all(isinstance(size, int) for size in vars(found).values()) else None

    def of_layer(self, width: int, on_cpu: bool, is_whole: bool) -> int:
        """Bytes that a layer keeps for each token, where it computes in numbers of `width` bytes.

        `on_cpu` its norms and its MLP's product keep their inputs only (engine/elementwise.py), and its attention what
        it computes the scores from again (engine/flash.py, engine/blockwise.py). Of a model that is held whole linear
        maps do not keep what these norms and this product give, either (engine/whole.py).
        """
        norms = 2 * self._norm(self.hidden, width, on_cpu)
        outputs = 0 if is_whole else 2 * width * self.hidden  # of the norms, which linear maps keep
        attention = width * (2 * self.query + 2 * self.key)  # q, out, k, v
        if not on_cpu:
            attention += width * self.query + FP32 * self.heads  # out packed; log-sum-exp
        head_norms = self._norm(self.query + self.key, width, on_cpu) if self.has_head_norm else 0
        mlp = (2 if is_whole else 3 if on_cpu else 4) * width * self.intermediate  # gate, up; product; activation
        return norms + outputs + attention + head_norms + mlp

    def of_ends(self, tokens: int, width: int, on_cpu: bool, logits: int) -> int:
        """Bytes before the first and after the last layer, where at most so many `logits` exist at once.

        The last norm, the head's input and its gradient; a part of the logits and theirs; the gradient of the head.
        """
        each = self._norm(self.hidden, width, on_cpu) + 2 * width * self.hidden
        part = 2 * width * min(tokens * self.vocabulary, logits)
        return tokens * each + part + width * self.vocabulary * self.hidden

    @staticmethod
    def _norm(size: int, width: int, on_cpu: bool) -> int:
        # Its input; or that in fp32, and what is multiplied with the weight.
        return (width if on_cpu else FP32 + width) * size


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank's device at the peak of a step: what is held all the time, and what a micro-batch adds.

    Parameters and optimiser state that are offloaded between steps are on the device during one, so that they count.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    activations: int
    recomputed: int
    device: int

    @property
    def held(self) -> int:
        return self.weights + self.gathered + self.gradients + self.optimizer

    def needed(self, checkpointing: bool) -> int:
        """With gradient checkpointing or without."""
        return self.held + (self.recomputed if checkpointing else self.activations)

    def fits(self, checkpointing: bool) -> bool:
        return self.needed(checkpointing) <= USABLE * self.device

    def told(self, checkpointing: bool) -> str:
        """For the banner."""
        without = f", {_gib(self.activations + self.held)} without" if checkpointing else ""
        return f"needs about {_gib(self.needed(checkpointing))} of {_gib(self.device)} GiB{without}"


def plan_memory(
    config: Config,
    layout: Layout,
    total: int,
    trainable: int,
    width: int,
    on_cpu: bool,
    longest: int,
    logits: int,
    device: int,
) -> Plan:
    """For a model of `total` parameters that computes in numbers of `width` bytes, on devices of `device` bytes.

    `on_cpu` norms and MLPs keep their inputs only, and a rank that is alone holds the model whole (engine/whole.py);
    `longest` is the longest example's number of tokens, `logits` how many exist at once at most.
    """
    fsdp, data = config.fsdp, config.data
    shards = fsdp.fsdp_size if fsdp.fsdp_size > 0 else config.trainer.world_size
    master = {"fp32": FP32, "bf16": 2}[fsdp.model_dtype]
    ranks = config.trainer.world_size // fsdp.ulysses_sequence_parallel_size
    of_step = data.train_batch_size * longest
    tokens = math.ceil(min(data.token_budget, of_step) / fsdp.ulysses_sequence_parallel_size)
    # Of a model in parts, two layers are gathered at once, and what is outside of layers all the time.
    outside = 2 * layout.vocabulary * layout.hidden
    in_parts = min(total, outside + 2 * total // layout.layers)
    accumulates = of_step > ranks * data.token_budget and fsdp.use_no_sync_for_gradient_accumulation
    is_whole = on_cpu and config.trainer.world_size == 1
    layer, ends = layout.of_layer(width, on_cpu, is_whole), layout.of_ends(tokens, width, on_cpu, logits)
    on_device = on_cpu or not fsdp.offload_policy
    gathered = width * (in_parts if reshards_after_forward(config, on_cpu) else total)
    # Until the last micro-batch they are whole, in fp32, on each rank.
    gradients = FP32 * trainable if accumulates else on_device * master * trainable // shards
    if is_whole:
        gathered, gradients = 0 if width == master else width * trainable, FP32 * trainable
    return Plan(
        weights=on_device * master * total // shards,
        gathered=gathered,
        gradients=gradients,
        optimizer=on_device * 2 * master * trainable // shards,
        # One layer more than there are: its gradients, in flight.
        activations=tokens * layer * (layout.layers + 1) + ends,
        recomputed=tokens * (layer * 2 + width * layout.hidden * layout.layers) + ends,
        device=device,
    )


def reshards_after_forward(config: Config, on_cpu: bool) -> bool:
    """On by default where it frees much: among several GPUs, and with parameters that wait in CPU memory.

    One rank alone frees the copy in the compute dtype, and makes it again twice in each micro-batch. Ranks on CPUs wait
    for what they gather: with gloo it takes a fifth of a step or more.
    """
    chosen = config.fsdp.reshard_after_forward
    frees_much = not on_cpu and (config.trainer.world_size > 1 or config.fsdp.offload_policy)
    return frees_much if chosen == "auto" else chosen


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
