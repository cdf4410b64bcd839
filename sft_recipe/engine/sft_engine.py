"""The SFT engine over verl's FSDP engine: planned micro-batches, logits only where a token is supervised, fp32 loss."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from tensordict import TensorDict
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils import fsdp_utils
from verl.utils.device import get_device_name
from verl.utils.torch_dtypes import PrecisionType
from verl.utils.ulysses import ulysses_pad_and_slice_inputs
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.engine.fsdp import transformer_impl

from sft_recipe.config.auto import PACKED_ATTENTION
from sft_recipe.engine import patches, quantized
from sft_recipe.engine.attention.packed import attention_inputs, supported_attention
from sft_recipe.engine.attention.prefix_sharing import Segment
from sft_recipe.engine.compilation import compile_layers
from sft_recipe.engine.loss import patch_chunked_cross_entropy
from sft_recipe.engine.lr_schedule import schedule
from sft_recipe.engine.micro_batches import Document, MicroBatch, pack, planned_documents
from sft_recipe.engine.optimization import LossScale, clip_grad_norm
from sft_recipe.engine.router_loss import router_coefficient, router_loss
from sft_recipe.errors import ConfigError
from sft_recipe.models.adapters import add_adapters, check_embeddings
from sft_recipe.models.families import SEQ2SEQ, family_of
from sft_recipe.models.freezing import freeze_weights
from sft_recipe.models.liger import apply_liger
from sft_recipe.models.loading import build_model, load_model

log = logging.getLogger(__name__)


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor=["nvidia", "amd"]
)
class SFTEngine(FSDPEngineWithLMHead):
    """verl's FSDP and FSDP2 engine for supervised fine-tuning, on CUDA and on CPU.

    A batch is a TensorDict of this rank's documents, jagged and in the order of the plan:

        input_ids           a a a a | b b | c c c      documents
        loss_mask           0 0 1 1 | 0 1 | 0 0 1
        micro_batch_docs    [2, 1]                     two documents in the first micro-batch, one in the second

    The loss of a step is the mean over all supervised tokens of the global batch, however it is split.
    """

    on_micro_batch: Callable[[], None] = staticmethod(lambda: None)  # called before each
    shares_prefixes = False  # whether the prefixes that documents of a micro-batch have in common are computed once
    packs_documents = True  # whether several documents may be in a micro-batch: see model_checks.py
    router_coefficient = 0.0  # of the auxiliary loss of a mixture of experts
    base_digest: int | None = None  # of the weights in 4 bits, where the base model is quantized
    computing: Callable[[], AbstractContextManager] = staticmethod(nullcontext)  # the model computes inside it only
    model: PreTrainedModel  # of transformers, inside LoRA and FSDP
    compute_dtype: torch.dtype
    loss_scale: LossScale

    def __init__(self, **settings: Any):
        """Takes verl's configurations by their names; raises PreflightError where a library does not fit."""
        patches.check(get_device_name())
        super().__init__(**settings)

    def is_mp_src_rank_with_outputs(self) -> bool:
        """Every rank has the loss, also where several share a sequence."""
        return True

    @staticmethod
    def is_unsharded() -> bool:
        """Whether this rank trains without FSDP."""
        return get_device_name() == "cpu" and torch.distributed.get_world_size() == 1

    def forward_backward_batch(  # type: ignore[override]  # verl declares a list and returns a dictionary
        self, data: TensorDict, loss_function: Callable | None, forward_only: bool = False
    ) -> dict[str, Any]:
        """Run the planned micro-batches. `loss_function` is not used: logits exist at supervised positions only.

        Returns verl's dictionary; `loss` holds one number: this rank's part of the global mean times the number of
        data-parallel ranks (verl averages over those). With `forward_only` its metrics have `correct`, the number of
        this rank's supervised tokens with the largest logit; else, where a router's loss is trained, its part of the
        mean over all tokens, `aux_loss`.
        """
        planned = [self.pack(documents) for documents in planned_documents(data)]
        tokens, all_tokens = self._count_tokens(data, planned)
        losses, aux_losses, correct = [], [], torch.zeros((), dtype=torch.long, device=get_device_name())
        ranks = torch.distributed.get_world_size()
        with self.computing():
            for index, micro_batch in enumerate(planned):
                self.on_micro_batch()
                is_last = index == len(planned) - 1
                sync: AbstractContextManager = (
                    nullcontext() if forward_only else self._gradient_sync_context(is_last_micro_batch=is_last)
                )
                with sync, torch.set_grad_enabled(not forward_only):
                    with self.offloading():
                        loss, hits, *router_logits = self.micro_batch_loss(
                            micro_batch, tokens, ranks, counts_correct=forward_only
                        )
                    aux_loss = self._router_loss(micro_batch, router_logits) * (ranks / all_tokens)
                    if not forward_only:
                        ((loss + aux_loss) * self.loss_scale.value).backward()
                        patches.restore_frozen_root(self.module)
                losses.append(loss.detach())
                aux_losses.append(aux_loss.detach())
                correct += hits
                # And their graph: thousands of small allocations among the activations of the next micro-batch.
                del loss, aux_loss, router_logits
        if forward_only:
            self._reshard()
        if self.use_ulysses_sp:
            torch.distributed.all_reduce(correct, group=self.ulysses_parallel_group)
        metrics: dict[str, Any] = {"correct": int(correct)} if forward_only else {}
        if self.router_coefficient and not forward_only:
            metrics["aux_loss"] = self._over_sequence_ranks(torch.stack(aux_losses).sum())
        loss_sum = self._over_sequence_ranks(torch.stack(losses).sum())
        return {"model_output": {}, "loss": [loss_sum], "metrics": metrics}

    def _count_tokens(self, data: TensorDict, planned: list[MicroBatch]) -> tuple[torch.Tensor, torch.Tensor]:
        """The supervised tokens of the global batch, and all its tokens; at least 1."""
        supervised = int(data["loss_mask"].values().sum())
        rows = sum(micro_batch.input_ids.size(1) for micro_batch in planned if len(micro_batch.targets))
        counts = torch.tensor([supervised, rows], device=get_device_name())
        torch.distributed.all_reduce(counts, group=self.get_data_parallel_group())
        supervised_tokens, all_tokens = counts.clamp(min=1)
        return supervised_tokens, all_tokens

    def _router_loss(self, micro_batch: MicroBatch, router_logits: list[torch.Tensor]) -> torch.Tensor:
        """The router's loss of the tokens on this rank, times its coefficient and their number; 0 for a filler."""
        tokens = micro_batch.input_ids.size(1) if len(micro_batch.targets) else 0
        if self.use_ulysses_sp and router_logits:
            rows = router_logits[0].reshape(-1, router_logits[0].shape[-1]).shape[0]
            begin = torch.distributed.get_rank(self.ulysses_parallel_group) * rows
            tokens = min(max(tokens - begin, 0), rows)  # the rest is padding
        if not router_logits or not tokens:
            return torch.zeros((), device=get_device_name())
        top_k = self.model.config.get_text_config().num_experts_per_tok
        return router_loss(router_logits, top_k, tokens) * (self.router_coefficient * tokens)

    def optimizer_step(self) -> float:
        """Clip and step; a norm that is not finite skips the step. Returns the norm before clipping."""
        limit = self.optimizer_config.clip_grad
        self.loss_scale.unscale(self.module.parameters())
        if isinstance(self.module, transformer_impl.FSDP):
            norm = self.module.clip_grad_norm_(limit)
        elif torch.distributed.get_world_size() == 1:
            norm = clip_grad_norm(self.module.parameters(), limit)
        else:
            norm = fsdp_utils.fsdp2_clip_grad_norm_(self.module.parameters(), max_norm=limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        is_finite = bool(torch.isfinite(norm))
        if is_finite:
            self.optimizer.step()
        else:
            self.optimizer.zero_grad()
        self.loss_scale.update(is_finite)
        return norm.item()

    def use_router_loss(self, coefficient: float | None) -> None:
        """Train the loss that balances experts; None: with the model's own coefficient. See router_coefficient."""
        self.router_coefficient = router_coefficient(self.model, coefficient, self._returns_loss)

    def set_step(self, step: int) -> None:
        """Set the learning rate to what it is after `step` optimizer steps."""
        scheduler = self.lr_scheduler
        scheduler.last_epoch = step
        for group, base, factor in zip(
            self.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(step)

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, parameters and optimizer state are on the device, offloaded or not."""
        has_model, has_optimizer = self.is_param_offload_enabled, self.is_optimizer_offload_enabled
        if not has_model and not has_optimizer:
            yield
            return
        self.to(device=get_device_name(), model=has_model, optimizer=has_optimizer, grad=False)
        try:
            yield
        finally:
            self.to(device="cpu", model=has_model, optimizer=has_optimizer, grad=False)

    def pack(self, documents: Sequence[Document]) -> Any:
        """Return the documents of a micro-batch as `micro_batch_loss` takes them."""
        return pack(documents, self.shares_prefixes)

    def micro_batch_loss(
        self, micro_batch: MicroBatch, tokens: torch.Tensor, ranks: int = 1, counts_correct: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Return the summed negative log-likelihood of the supervised tokens, times `ranks` over `tokens`, in fp32.

        `tokens` is an integer tensor with one number. With `counts_correct`, the second value is the number of
        supervised tokens that have the largest logit. Where a router's loss is trained, the logits of each layer's
        router follow.
        """
        input_ids, position_ids = micro_batch.input_ids, micro_batch.position_ids
        positions, targets, segments = micro_batch.positions, micro_batch.targets, micro_batch.segments
        if self.use_ulysses_sp:
            size = self.ulysses_sequence_parallel_size
            input_ids, position_ids, padding = ulysses_pad_and_slice_inputs(input_ids, position_ids, sp_size=size)
            end = segments[-1].end
            segments = [*segments, *([Segment(end, end + padding)] if padding else [])]
            positions = positions - torch.distributed.get_rank(self.ulysses_parallel_group) * input_ids.size(1)
            is_here = (positions >= 0) & (positions < input_ids.size(1))
            positions, targets = positions[is_here], targets[is_here]
        # A rank without supervised tokens runs the model all the same: others wait for it in their collectives.
        device = get_device_name()
        input_ids, position_ids, positions, targets = (
            tensor.to(device, non_blocking=True) for tensor in (input_ids, position_ids, positions, targets)
        )
        inputs: dict[str, Any] = dict(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        inputs |= attention_inputs(self.model, segments, input_ids.device, self.ulysses_sequence_parallel_size)
        if self.router_coefficient and torch.is_grad_enabled():
            inputs["output_router_logits"] = True
        with self.autocast():
            if self._returns_loss:
                return self.module(
                    **inputs,
                    positions=positions,
                    targets=targets,
                    tokens=tokens.to(device),
                    ranks=ranks,
                    loss_scale=self.loss_scale.value,
                    counts_correct=counts_correct,
                )
            logits = self.module(**inputs).logits[0, positions]
        loss = F.cross_entropy(logits.float(), targets, reduction="sum") * (ranks / tokens.to(device).float())
        return loss, (logits.argmax(-1) == targets).sum()

    def autocast(self) -> AbstractContextManager:
        """Inside, the model computes in its compute dtype."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device_type=get_device_name(), dtype=self.compute_dtype)

    def uncompiled(self) -> AbstractContextManager:
        """Inside, compiled layers run as they are written: where each call has other shapes or another attention."""
        return torch.compiler.set_stance("force_eager") if self.engine_config.use_torch_compile else nullcontext()

    def offloading(self) -> AbstractContextManager:
        """Inside, what is saved for the backward pass goes to the host: the inputs of layers, which are recomputed."""
        settings: Any = self.model_config
        is_used = settings.offloads_layer_inputs and torch.is_grad_enabled()
        return torch.autograd.graph.save_on_cpu(pin_memory=True) if is_used else nullcontext()

    def _over_sequence_ranks(self, loss: torch.Tensor) -> float:
        """The mean over the ranks that share a sequence: each has the loss of its slice, and verl averages over data
        ranks only.
        """
        if self.use_ulysses_sp:
            torch.distributed.all_reduce(loss, group=self.ulysses_parallel_group)
            loss = loss / self.ulysses_sequence_parallel_size
        return loss.item()

    @contextlib.contextmanager
    def _gradient_sync_context(self, *, is_last_micro_batch: bool) -> Iterator[None]:
        """verl's; keeps weights that stay gathered after the forward pass until the last backward pass of the step."""
        if isinstance(self.module, FSDPModule) and not self.engine_config.reshard_after_forward:
            self.module.set_reshard_after_backward(is_last_micro_batch)
        with super()._gradient_sync_context(is_last_micro_batch=is_last_micro_batch):
            yield

    def _reshard(self) -> None:
        """Free the weights that a forward pass without a backward pass has gathered."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _build_module(self) -> nn.Module:
        config = self.model_config.hf_config
        patches.set_attention_implementation(config, supported_attention(config))
        self.compute_dtype = PrecisionType.to_dtype((self.engine_config.mixed_precision or {})["param_dtype"])
        is_frozen = self.model_config.lora_rank > 0
        dtype = self.compute_dtype if is_frozen else PrecisionType.to_dtype(self.engine_config.model_dtype)
        trusts_code = self.model_config.trust_remote_code
        settings: Any = self.model_config
        quantize_on = quantized.rank_device() if settings.quantize else None
        # FSDP sends the weights from the first rank; where some are tied, it needs them everywhere.
        is_tied = config.tie_word_embeddings or family_of(config) is SEQ2SEQ
        has_weights = is_tied or settings.quantize or self.device_mesh.get_coordinate()[-1] == 0
        with fsdp_utils.get_init_weight_context_manager(not has_weights, self.device_mesh)():
            if has_weights:
                model = load_model(Path(self.model_config.path), config, dtype, trusts_code, quantize_on)
            else:
                model = build_model(config, trusts_code)
        if self.use_ulysses_sp:
            self._split_sequences(model)
        if quantize_on:
            self.base_digest = quantized.shared_digest(model)
        else:
            cast_parameters(model, dtype)
        if settings.use_liger:
            apply_liger(model)
        freeze_weights(model, settings.freeze, settings.train_only)
        if self.model_config.enable_gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def _split_sequences(self, model: PreTrainedModel) -> None:
        """Let flash-attn exchange heads between the ranks that share a sequence; packed attention does so itself."""
        config, size = model.config.get_text_config(), self.ulysses_sequence_parallel_size
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        if heads % size or (groups % size and size % groups):
            raise ConfigError(
                f"fsdp.ulysses_sequence_parallel_size={size} cannot share the model's {heads} heads and {groups} heads "
                "of keys evenly; choose a size that divides both"
            )
        chosen = patches.attention_implementation(config)
        if chosen.startswith("flash_attention"):
            apply_monkey_patch(model, ulysses_sp_size=size)
        elif chosen != PACKED_ATTENTION:
            raise ConfigError(
                f"{config.model_type} has its own attention code, so ranks cannot share a sequence without flash-attn; "
                "set fsdp.ulysses_sequence_parallel_size=1"
            )

    def _build_lora_module(self, module: Any) -> nn.Module:
        """Adapters are in fp32 over weights in the compute dtype, except where FSDP1 would have both in one unit."""
        module.enable_input_require_grads()
        config: Any = self.model_config
        adapted = add_adapters(
            module, config.lora_rank, config.lora_alpha, config.target_modules, config.exclude_modules
        )
        alone = {id(leaf.weight) for leaf in adapted.modules() if isinstance(leaf, nn.Linear)}
        trained = [weight for weight in adapted.parameters() if weight.requires_grad]
        head = module.get_output_embeddings()
        is_mixed = any(id(weight) not in alone for weight in trained) or hasattr(head, "lora_A")
        if self.engine_config.strategy == "fsdp" and is_mixed:
            cast_parameters(adapted, torch.float32)
        return adapted

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        model: Any = module.get_base_model() if isinstance(module, PeftModel) else module
        self.model = model
        self.loss_scale = LossScale(self.compute_dtype == torch.float16)
        whole = self._weights_of_root(model)
        is_compiled = self.engine_config.use_torch_compile
        if is_compiled:
            compile_layers(model)
        elif get_device_name() == "cpu":
            from sft_recipe.engine.cpu.recompute import recompute_norms_and_mlps

            recompute_norms_and_mlps(model)
        if not self.is_unsharded():
            if self.engine_config.strategy == "fsdp2":
                check_embeddings(model)
            with patches.keep_unwrapped(whole):
                if self.base_digest is not None:
                    self._uses_fsdp2_cpu_offload_policy = self.engine_config.offload_policy
                    return quantized.shard(module, self)
                return super()._build_fsdp_module(module)
        from sft_recipe.engine.cpu.unsharded import UnshardedModel

        layers = patches.layer_class_names(model)
        self.computing = UnshardedModel(module, self.compute_dtype, layers, is_compiled).computing
        return module

    def _weights_of_root(self, model: PreTrainedModel) -> Sequence[nn.Parameter]:
        """Patch the model's loss; returns the weights that belong to no layer's FSDP unit."""
        head = patch_chunked_cross_entropy(model)
        self._returns_loss = head is not None
        if head is None:
            log.warning("%s has no separate head: the logits of all tokens are computed.", type(model).__name__)
        return head or []

    def _build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        config: Any = self.optimizer_config
        return LambdaLR(optimizer, lambda step: schedule(step, config.total_training_steps, config.schedule))


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters; buffers, such as the frequencies of rotary embeddings, keep their precision."""
    buffers = [(part, *named) for part in model.modules() for named in part.named_buffers(recurse=False)]
    model.to(dtype)
    for part, name, buffer in buffers:
        setattr(part, name, buffer)
