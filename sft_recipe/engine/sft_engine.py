"""The SFT engine over verl's FSDP engine: planned micro-batches, logits only where a token is supervised, fp32 loss."""

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from tensordict import TensorDict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from verl.utils import fsdp_utils
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.utils.torch_dtypes import PrecisionType
from verl.utils.ulysses import ulysses_pad_and_slice_inputs
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.engine.fsdp import transformer_impl

from sft_recipe.engine.attention.packed import PACKED, PrefixSharingUnsupported, best_attention, packed_documents
from sft_recipe.engine.attention.prefix_sharing import SHORTEST, Pack, Segment, concatenate, share_prefixes
from sft_recipe.engine.cpu.recompute import recompute_norms_and_mlps
from sft_recipe.engine.cpu.unsharded import UnshardedModel, clip_grad_norm
from sft_recipe.engine.loss import patch_chunked_cross_entropy
from sft_recipe.errors import ModelError

log = logging.getLogger(__name__)

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # among transformers' types of layers


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
@EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor=["nvidia", "amd"]
)
class SFTEngine(FSDPEngineWithLMHead):
    """verl's FSDP and FSDP2 engine for supervised fine-tuning, on CUDA and on CPU.

    A batch is a TensorDict of this rank's documents, jagged and in the order of the plan:

        input_ids           a a a a | b b | c c c      documents
        loss_mask           0 0 1 1 | 0 1 | 0 0 1
        micro_batch_docs    [2, 1]                     the first two make one packed micro-batch, then the third

    The loss of a step is the mean over all supervised tokens of the global batch, however it is split.
    """

    on_micro_batch: Callable[[], None] = staticmethod(lambda: None)  # called before each
    shares_prefixes = False  # whether tokens with which several documents of a micro-batch begin run once
    _documents_isolated: bool | None = None  # whether the model's documents do not see each other; looked at once
    _computing: Callable[[], AbstractContextManager] = staticmethod(nullcontext)  # the model computes inside it only

    def is_mp_src_rank_with_outputs(self) -> bool:
        """Every rank has the loss, also where several share a sequence."""
        return True

    @staticmethod
    def is_unsharded() -> bool:
        """Whether this rank trains without FSDP."""
        return get_device_name() == "cpu" and torch.distributed.get_world_size() == 1

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable | None, forward_only: bool = False
    ) -> dict:
        """Run the planned micro-batches. `loss_function` is not used: logits exist at supervised positions only.

        Returns verl's dictionary; `loss` holds one number per micro-batch, which sum to this rank's share of the
        global mean times the number of data-parallel ranks (verl averages over those).
        """
        group = self.get_data_parallel_group()
        tokens = data["loss_mask"].values().sum().to(get_device_name())
        torch.distributed.all_reduce(tokens, group=group)
        scale = torch.distributed.get_world_size() / tokens.clamp(min=1)
        losses = []
        with self._computing():
            if self._documents_isolated is None:
                self._check_isolation()
            micro_batches = list(_micro_batches(data, self.shares_prefixes))
            for index, (segments, *inputs) in enumerate(micro_batches):
                self.on_micro_batch()
                is_last = index == len(micro_batches) - 1
                sync: AbstractContextManager = (
                    nullcontext() if forward_only else self._gradient_sync_context(is_last_micro_batch=is_last)
                )
                with sync, torch.set_grad_enabled(not forward_only), packed_documents(segments):
                    loss = self._loss(*inputs, scale=scale)
                    if not forward_only:
                        loss.backward()
                losses.append(loss.detach())
                del loss  # its graph, thousands of small pieces among the activations, is not to outlive it
        if forward_only:
            self._reshard()
        return {"model_output": {}, "loss": [self._over_sequence_ranks(torch.stack(losses).sum())], "metrics": {}}

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
        """Put the schedule where it stands after `step` optimiser steps."""
        scheduler = self.lr_scheduler
        scheduler.last_epoch = step
        for group, base, factor in zip(
            self.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(step)

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Parameters and optimiser state on the device for as long as the context lasts, offloaded or not."""
        parts: dict[str, Any] = dict(model=self._is_offload_param, optimizer=self._is_offload_optimizer, grad=False)
        if not any(parts.values()):
            yield
            return
        self.to(device=get_device_name(), **parts)
        try:
            yield
        finally:
            self.to(device="cpu", **parts)

    def _loss(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        *,
        scale: torch.Tensor,
    ) -> torch.Tensor:
        """The negative log-likelihood, summed over the supervised tokens of one pack, in fp32, times `scale`.

        input_ids and position_ids (1, rows); of each supervised token the row before it and itself, (supervised,) both.
        """
        device = get_device_name()
        if self.use_ulysses_sp:
            size = self.ulysses_sequence_parallel_size
            input_ids, position_ids, _ = ulysses_pad_and_slice_inputs(input_ids, position_ids, sp_size=size)
            positions = positions - torch.distributed.get_rank(self.ulysses_parallel_group) * input_ids.size(1)
            is_here = (positions >= 0) & (positions < input_ids.size(1))
            positions, targets = positions[is_here], targets[is_here]
        # Where there are none, the model runs all the same: others wait for this rank in their collectives.
        input_ids, position_ids, positions, targets = (
            part.to(device, non_blocking=True) for part in (input_ids, position_ids, positions, targets)
        )
        inputs = dict(input_ids=input_ids, attention_mask=None, position_ids=position_ids, use_cache=False)
        with self._autocast():
            if self._returns_loss:
                return self.module(**inputs, positions=positions, targets=targets, scale=scale)
            logits = self.module(**inputs).logits[0, positions]
        return F.cross_entropy(logits.float(), targets, reduction="sum") * scale

    def _check_isolation(self) -> None:
        """Try it, once: nothing is shared where the model cannot. Raises ModelError where a pack's documents mix."""
        self._documents_isolated = True
        if self.shares_prefixes and not self._probe_isolation(is_shared=True):
            self.shares_prefixes = False
            log.warning("This model cannot share the beginnings of documents.")
        if not self.shares_prefixes and not self._probe_isolation(is_shared=False):
            raise ModelError(
                "this model lets a document see the one before it in the same micro-batch, as recurrent and "
                "convolutional layers do: only models whose tokens meet in attention alone can be trained here"
            )

    def _probe_isolation(self, is_shared: bool) -> bool:
        """Whether of three documents the last one's loss stays as it is when the one before it changes.

        To the last bit, but where experts multiply the tokens of all documents together. Where documents 2 and 3 go on
        after the first, that one must be seen.
        """
        was_training = self.module.training
        self.module.eval()
        try:
            as_is = self._probe_loss(None, is_shared)
            of_second = abs(self._probe_loss(1, is_shared) - as_is)
            if of_second > 0 and self._has_experts():
                of_second -= 0.01 * abs(self._probe_loss(2, is_shared) - as_is)
            return not of_second > 0 and (not is_shared or self._probe_loss(0, is_shared) != as_is)
        except PrefixSharingUnsupported:
            return False
        finally:
            self.module.train(was_training)

    def _has_experts(self) -> bool:
        """And else only attention."""
        layers = getattr(self.model_config.hf_config.get_text_config(), "layer_types", None)
        return set(layers or ()) <= ATTENTION and any("expert" in name for name, _ in self.module.named_modules())

    def _probe_loss(self, changed: int | None, is_shared: bool) -> float:
        """The loss of the last document's first tokens, with other tokens in one of the three."""
        size = SHORTEST
        first = Segment(0, size)
        prefix = (first,) if is_shared else ()
        segments = [first, Segment(size, 2 * size, prefix), Segment(2 * size, 3 * size, prefix)]
        position_ids = torch.cat([torch.arange(size) + segment.position for segment in segments])[None]
        positions = torch.arange(2 * size, 2 * size + 4)
        ids = torch.arange(3 * size) * 7 % 31
        if changed is not None:
            ids[changed * size : (changed + 1) * size] += 1
        with torch.no_grad(), packed_documents(segments):
            return float(
                self._loss(ids[None], position_ids, positions, torch.arange(len(positions)), scale=torch.ones(()))
            )

    def _autocast(self) -> AbstractContextManager:
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device_type=get_device_name(), dtype=self._autocast_dtype)

    def _over_sequence_ranks(self, loss: torch.Tensor) -> float:
        """With sequence parallelism each rank has the loss of its slice; verl averages over data ranks only."""
        if self.use_ulysses_sp:
            torch.distributed.all_reduce(loss, group=self.ulysses_parallel_group)
            loss = loss / self.ulysses_sequence_parallel_size
        return loss.item()

    @contextlib.contextmanager
    def _gradient_sync_context(self, *, is_last_micro_batch: bool) -> Iterator[None]:
        """verl's, and weights that stay gathered after the forward stay so until the step's last backward."""
        if isinstance(self.module, FSDPModule) and not self.engine_config.reshard_after_forward:
            self.module.set_reshard_after_backward(is_last_micro_batch)
        with super()._gradient_sync_context(is_last_micro_batch=is_last_micro_batch):
            yield

    def _reshard(self) -> None:
        """Free what a forward without a backward has gathered."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _build_module(self) -> torch.nn.Module:
        model = self.model_config.hf_config
        if model._attn_implementation == PACKED and best_attention(model) != PACKED:
            log.warning("%s brings its own attention: packed documents are masked from each other.", model.model_type)
            model._attn_implementation = best_attention(model)
        return super()._build_module()

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        model = module.get_base_model() if isinstance(module, PeftModel) else module
        head = patch_chunked_cross_entropy(model)
        self._returns_loss = head is not None
        if head is None:
            log.warning("%s has no head of its own: the logits of all tokens are computed.", type(model).__name__)
        if get_device_name() == "cpu":
            recompute_norms_and_mlps(model)
        if not self.is_unsharded():
            with _unwrapped_head(head or []):
                return super()._build_fsdp_module(module)
        self._autocast_dtype = PrecisionType.to_dtype(self.engine_config.mixed_precision["param_dtype"])
        layers = model._no_split_modules or ()
        self._computing = UnshardedModel(module, self._autocast_dtype, self._is_lora, layers).computing
        return module

    def _build_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        config = self.optimizer_config
        steps = config.total_training_steps
        warmup = config.lr_warmup_steps if config.lr_warmup_steps > 0 else int(config.lr_warmup_steps_ratio * steps)
        return LambdaLR(
            optimizer, lambda step: schedule(step, steps, warmup, config.lr_scheduler_type, config.min_lr_ratio)
        )


@contextlib.contextmanager
def _unwrapped_head(weights: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """verl wraps no module that holds these: they are whole as long as the root's forward and backward run.

    Of FSDP2 it would wrap an untied head, of FSDP1 its adapters, which are whole only inside their own calls.
    """
    kept = set(weights)
    select, policy_for = fsdp_utils._select_fsdp2_wrap_targets, transformer_impl.get_fsdp_wrap_policy

    def select_others(*given: Any) -> list[torch.nn.Module]:
        return [part for part in select(*given) if kept.isdisjoint(part.parameters())]

    def policy_for_others(**given: Any) -> Callable | None:
        if (policy := policy_for(**given)) is None:
            return None

        def wraps(module: torch.nn.Module, recurse: bool, **rest: Any) -> bool:
            is_kept = not recurse and not kept.isdisjoint(module.parameters())
            return not is_kept and policy(module=module, recurse=recurse, **rest)

        return wraps

    fsdp_utils._select_fsdp2_wrap_targets = select_others
    transformer_impl.get_fsdp_wrap_policy = policy_for_others
    try:
        yield
    finally:
        fsdp_utils._select_fsdp2_wrap_targets = select
        transformer_impl.get_fsdp_wrap_policy = policy_for


def schedule(step: int, total: int, warmup: int, kind: str, min_ratio: float) -> float:
    """The share of the peak learning rate at optimiser step `step` (from 0).

    Rises in equal parts over `warmup` steps, the first of which is above 0; then constant, linear or half a cosine
    (https://arxiv.org/abs/1608.03983, without restarts) towards `min_ratio`, which would be reached at step `total`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[kind]
    return shape if kind == "constant" else min_ratio + (1.0 - min_ratio) * shape


def _micro_batches(
    data: TensorDict, shares_prefixes: bool
) -> Iterator[tuple[list[Segment], torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The segments of each pack, its input_ids and position_ids (1, rows), and where its supervised tokens come from.

    That is the row before each, and the token itself, (supervised,) both. The first token of a document has none.
    """
    ids, mask, position_ids = (data[key].values() for key in ("input_ids", "loss_mask", "position_ids"))
    offsets = data["input_ids"].offsets().tolist()
    doc = 0
    for count in tu.get(data, "micro_batch_docs"):
        begin, end = offsets[doc], offsets[doc + count]
        lengths = [stop - start for start, stop in itertools.pairwise(offsets[doc : doc + count + 1])]
        pack = _pack(ids[begin:end].split(lengths), shares_prefixes)
        rows = torch.from_numpy(pack.rows)
        tokens = torch.empty(pack.segments[-1].end, dtype=torch.long)  # one of those that stand in each row
        tokens[rows] = torch.arange(begin, end)
        supervised = (mask[begin:end].bool() & (position_ids[begin:end] > 0)).nonzero()[:, 0]
        positions, targets = rows[supervised - 1], ids[begin + supervised]
        yield pack.segments, ids[tokens][None], position_ids[tokens][None], positions, targets
        doc += count


def _pack(documents: Sequence[torch.Tensor], shares_prefixes: bool) -> Pack:
    if shares_prefixes:
        return share_prefixes([document.numpy() for document in documents])
    return concatenate([len(document) for document in documents])
