"""The SFT engine over verl's FSDP engine: planned micro-batches, logits only where a token is supervised, fp32 loss."""

import contextlib
import logging
from collections.abc import Callable, Iterator
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
from sft_recipe.engine import patches
from sft_recipe.engine.attention.documents import PackedDocuments
from sft_recipe.engine.attention.packed import best_attention
from sft_recipe.engine.loss import patch_chunked_cross_entropy
from sft_recipe.engine.micro_batches import MicroBatch, micro_batches
from sft_recipe.engine.optimization import clip_grad_norm, schedule
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
    computing: Callable[[], AbstractContextManager] = staticmethod(nullcontext)  # the model computes inside it only
    model: PreTrainedModel  # of transformers, inside LoRA and FSDP
    compute_dtype: torch.dtype

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
        this rank's supervised tokens with the largest logit.
        """
        group = self.get_data_parallel_group()
        tokens = data["loss_mask"].values().sum().to(get_device_name())
        torch.distributed.all_reduce(tokens, group=group)
        tokens = tokens.clamp(min=1)
        losses, correct = [], torch.zeros((), dtype=torch.long, device=get_device_name())
        with self.computing():
            planned = list(micro_batches(data, self.shares_prefixes))
            for index, micro_batch in enumerate(planned):
                self.on_micro_batch()
                is_last = index == len(planned) - 1
                sync: AbstractContextManager = (
                    nullcontext() if forward_only else self._gradient_sync_context(is_last_micro_batch=is_last)
                )
                with sync, torch.set_grad_enabled(not forward_only):
                    loss, hits = self.micro_batch_loss(
                        micro_batch, tokens, torch.distributed.get_world_size(), counts_correct=forward_only
                    )
                    if not forward_only:
                        loss.backward()
                losses.append(loss.detach())
                correct += hits
                del loss  # and its graph: thousands of small allocations among the activations of the next micro-batch
        if forward_only:
            self._reshard()
        if self.use_ulysses_sp:
            torch.distributed.all_reduce(correct, group=self.ulysses_parallel_group)
        metrics = {"correct": int(correct)} if forward_only else {}
        loss_sum = self._over_sequence_ranks(torch.stack(losses).sum())
        return {"model_output": {}, "loss": [loss_sum], "metrics": metrics}

    def optimizer_step(self) -> float:
        """Clip and step; a norm that is not finite skips the step. Returns the norm before clipping."""
        limit = self.optimizer_config.clip_grad
        if isinstance(self.module, transformer_impl.FSDP):
            norm = self.module.clip_grad_norm_(limit)
        elif torch.distributed.get_world_size() == 1:
            norm = clip_grad_norm(self.module.parameters(), limit)
        else:
            norm = fsdp_utils.fsdp2_clip_grad_norm_(self.module.parameters(), max_norm=limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if torch.isfinite(norm):
            self.optimizer.step()
        else:
            self.optimizer.zero_grad()
        return norm.item()

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

    def micro_batch_loss(
        self, micro_batch: MicroBatch, tokens: torch.Tensor, ranks: int = 1, counts_correct: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed negative log-likelihood of the supervised tokens, times `ranks` over `tokens`, in fp32.

        `tokens` is an integer tensor with one number. With `counts_correct`, the second value is the number of
        supervised tokens that have the largest logit.
        """
        input_ids, position_ids = micro_batch.input_ids, micro_batch.position_ids
        positions, targets = micro_batch.positions, micro_batch.targets
        if self.use_ulysses_sp:
            size = self.ulysses_sequence_parallel_size
            input_ids, position_ids, _ = ulysses_pad_and_slice_inputs(input_ids, position_ids, sp_size=size)
            positions = positions - torch.distributed.get_rank(self.ulysses_parallel_group) * input_ids.size(1)
            is_here = (positions >= 0) & (positions < input_ids.size(1))
            positions, targets = positions[is_here], targets[is_here]
        # A rank without supervised tokens runs the model all the same: others wait for it in their collectives.
        device = get_device_name()
        input_ids, position_ids, positions, targets = (
            tensor.to(device, non_blocking=True) for tensor in (input_ids, position_ids, positions, targets)
        )
        is_packed = patches.attention_implementation(self.model.config) == PACKED_ATTENTION
        inputs = dict(
            input_ids=input_ids,
            attention_mask=PackedDocuments(micro_batch.segments) if is_packed else None,
            position_ids=position_ids,
            use_cache=False,
        )
        with self.autocast():
            if self._returns_loss:
                return self.module(
                    **inputs,
                    positions=positions,
                    targets=targets,
                    tokens=tokens.to(device),
                    ranks=ranks,
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
        best = best_attention(config)
        if patches.attention_implementation(config) == PACKED_ATTENTION != best:
            log.warning("%s has its own attention code: packed documents are isolated by masks.", config.model_type)
            patches.set_attention_implementation(config, best)
        dtype = PrecisionType.to_dtype(self.engine_config.model_dtype)
        trusts_code = self.model_config.trust_remote_code
        # FSDP sends the weights from the first rank; where some are tied, it needs them everywhere.
        has_weights = config.tie_word_embeddings or self.device_mesh.get_coordinate()[-1] == 0
        with fsdp_utils.get_init_weight_context_manager(not has_weights, self.device_mesh)():
            if has_weights:
                model = load_model(Path(self.model_config.path), config, dtype, trusts_code)
            else:
                model = build_model(config, trusts_code)
        if self.use_ulysses_sp:
            apply_monkey_patch(model, ulysses_sp_size=self.ulysses_sequence_parallel_size)
        model.to(dtype)
        if self.model_config.enable_gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        model: Any = module.get_base_model() if isinstance(module, PeftModel) else module
        self.model = model
        self.compute_dtype = PrecisionType.to_dtype((self.engine_config.mixed_precision or {})["param_dtype"])
        head = patch_chunked_cross_entropy(model)
        self._returns_loss = head is not None
        if head is None:
            log.warning("%s has no separate head: the logits of all tokens are computed.", type(model).__name__)
        if get_device_name() == "cpu":
            from sft_recipe.engine.cpu.recompute import recompute_norms_and_mlps

            recompute_norms_and_mlps(model)
        if not self.is_unsharded():
            with patches.keep_head_unwrapped(head or []):
                return super()._build_fsdp_module(module)
        from sft_recipe.engine.cpu.unsharded import UnshardedModel

        converts_frozen = self.model_config.lora_rank > 0
        layers = patches.layer_class_names(model)
        self.computing = UnshardedModel(module, self.compute_dtype, converts_frozen, layers).computing
        return module

    def _build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        config: Any = self.optimizer_config
        steps = config.total_training_steps
        warmup = config.lr_warmup_steps if config.lr_warmup_steps > 0 else int(config.lr_warmup_steps_ratio * steps)
        return LambdaLR(
            optimizer, lambda step: schedule(step, steps, warmup, config.lr_scheduler_type, config.min_lr_ratio)
        )
