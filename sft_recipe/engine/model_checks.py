"""What is checked of a model before its first step: that packed documents are isolated, and that the loss is right.

The functions are collective, and leave the model and all random states as they were.
"""

import inspect
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tensordict import TensorDict
from transformers import PreTrainedModel
from verl.utils.device import get_device_name

from sft_recipe.engine import patches
from sft_recipe.engine.attention.documents import MaskUnsupported
from sft_recipe.engine.attention.prefix_sharing import SHORTEST, Segment
from sft_recipe.engine.loss import SOFTMAX_CHUNK
from sft_recipe.engine.micro_batches import Document, MicroBatch, planned_documents
from sft_recipe.errors import ModelError, RecipeError
from sft_recipe.models.dims import LOGITS_CHUNK
from sft_recipe.models.families import SEQ2SEQ, family_of

if TYPE_CHECKING:
    from sft_recipe.engine.sft_engine import SFTEngine

log = logging.getLogger(__name__)

AFTERWARDS = 3  # the tokens of the last probed document that come after those whose loss is computed
# Largest difference between the loss and that of plain transformers: a share of the loss, or in nats below one. In
# 16 bits it holds for the mean over at least ENOUGH tokens, in which the rounding of one token counts little.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
ENOUGH = 100


def choose_packing(engine: "SFTEngine", token_budget: int) -> None:
    """Test how documents share a micro-batch of `token_budget` tokens: switch off what the model does not support.

    Sets `engine.shares_prefixes` and `engine.packs_documents`, and the attention of models whose own code reads its
    mask. Raises ModelError for a model whose tokens see later ones.
    """
    if _counts_rows(engine, token_budget):
        engine.shares_prefixes = engine.packs_documents = False
        log.warning("This model counts positions in rows of a pack: each document is computed by itself.")
        return
    with evaluating(engine), engine.uncompiled():
        _require_mask_support(engine)
        _require_causality(engine)
        if engine.shares_prefixes and not _is_isolated(engine, is_shared=True):
            engine.shares_prefixes = False
            log.warning("This model does not support prefix sharing.")
        engine.packs_documents = engine.shares_prefixes or _is_isolated(engine, is_shared=False)
    if not engine.packs_documents:
        log.warning("This model cannot tell packed documents apart: each is computed by itself, which is slower.")


def loss_difference(engine: "SFTEngine", data: TensorDict) -> float:
    """Compare the loss of all ranks' first micro-batch with that of the model's own code, a document at a time.

    The reference is a plain forward of the transformers model, with an attention of transformers, and without packing
    or prefix sharing. Returns the relative difference of the losses, or the difference in nats where they are below
    one. Raises ModelError where it exceeds `tolerance`. Of each document, as many supervised tokens are compared as the
    loss has logits at a time.
    """
    vocabulary = engine.model.config.get_text_config(decoder=True).vocab_size
    limit = max(1, LOGITS_CHUNK[get_device_name()] // vocabulary)
    documents = [_with_at_most(limit, document) for document in next(planned_documents(data))]
    with evaluating(engine):
        packed = engine.pack(documents)
        ours = engine.micro_batch_loss(packed, tokens=torch.ones((), dtype=torch.long))[0].double()
        reference = _plain_loss(engine, documents).double()
    sums = torch.stack([ours, reference, torch.tensor(float(len(packed.targets)), device=ours.device).double()])
    dist.all_reduce(sums)
    ours_mean, reference_mean = (sums[:2] / sums[2].clamp(min=1)).tolist()
    difference = abs(ours_mean - reference_mean) / max(1.0, abs(reference_mean))
    if not math.isfinite(reference_mean):
        raise ModelError(
            f"the loss of the first micro-batch is {reference_mean}, computed by plain transformers as well: look for "
            "NaN and infinite values in the model's weights. model.verify_first_step=false trains all the same."
        )
    if not difference <= tolerance(engine.compute_dtype, int(sums[2])):
        raise ModelError(
            f"the loss of the first micro-batch is {ours_mean:.6f}, but plain transformers computes "
            f"{reference_mean:.6f} for {type(engine.model).__name__}: it would be trained wrongly. Try "
            "model.attn_implementation=sdpa; model.verify_first_step=false trains all the same."
        )
    return difference


def tolerance(dtype: torch.dtype, tokens: int) -> float:
    """Return the largest difference of the losses over `tokens` tokens that rounding explains.

    Tokens are rounded independently, so that the error of their mean falls with the square root of their number. The
    rounding of fp32 is far below its limit for a single token too.
    """
    if dtype == torch.float32:
        return TOLERANCE[dtype]
    return TOLERANCE[dtype] * math.sqrt(max(1.0, ENOUGH / max(1, tokens)))


@contextmanager
def evaluating(engine: "SFTEngine") -> Iterator[None]:
    """Inside, the model computes without gradients, and without dropout, which would draw random numbers.

    verl's own mode brings offloaded weights to the device, and lets ranks that share a sequence find each other.
    """
    with engine.eval_mode(), engine.computing(), torch.no_grad():
        yield


def _with_at_most(count: int, document: Document) -> Document:
    ids, mask = document
    return ids, mask * (mask.cumsum(0) <= count)


def _plain_loss(engine: "SFTEngine", documents: list[Document]) -> torch.Tensor:
    """The summed negative log-likelihood; all ranks run as many forward passes, and FSDP waits for none."""
    count = largest(len(documents))
    used = patches.attention_implementation(engine.model.config)
    engine.model.set_attn_implementation(attention_of_transformers(engine))
    try:
        with engine.uncompiled():
            losses = [_document_loss(engine, document) for document in documents]
            for _ in range(count - len(documents)):
                _document_loss(engine, documents[-1])
    finally:
        engine.model.set_attn_implementation(used)
    return torch.stack(losses).sum()


def _document_loss(engine: "SFTEngine", document: Document) -> torch.Tensor:
    if family_of(engine.model.config) is SEQ2SEQ:
        batch = engine.pack([document])
        with engine.autocast():  # the model shifts the labels by itself
            output = engine.module(
                input_ids=batch.input_ids.to(get_device_name()),
                labels=batch.labels.to(get_device_name()),
                use_cache=False,
            )
        return output.loss.float() * len(batch.targets)
    ids, mask = (tensor.to(get_device_name()) for tensor in document)
    targets = (mask[1:] > 0).nonzero()[:, 0] + 1
    selects = accepts(engine.model, "logits_to_keep")
    chosen = {"logits_to_keep": targets - 1} if selects else {}
    with engine.autocast():
        logits = engine.module(input_ids=ids[None], use_cache=False, **chosen).logits[0]
    return _summed_loss(logits if selects else logits[targets - 1], ids[targets])


def _summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy in fp32, over a part of the tokens at a time: a step has no logits of all in fp32."""
    rows = max(1, SOFTMAX_CHUNK[logits.device.type] // logits.shape[1])
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return torch.stack([F.cross_entropy(part.float(), target, reduction="sum") for part, target in parts]).sum()


def accepts(model: PreTrainedModel, name: str) -> bool:
    """Return whether the model's own forward has a parameter of this name."""
    return name in inspect.signature(type(model).forward).parameters


def attention_of_transformers(engine: "SFTEngine") -> str:
    """Return the best attention of transformers itself that the model supports."""
    return "sdpa" if patches.supports_sdpa(type(engine.model)) else "eager"


def _counts_rows(engine: "SFTEngine", token_budget: int) -> bool:
    """Whether packs are so long that Llama 4 scales attention by rows, rather than by positions in documents."""
    config = engine.model.config.get_text_config()
    return bool(getattr(config, "attn_temperature_tuning", False)) and token_budget > config.floor_scale


def _require_mask_support(engine: "SFTEngine") -> None:
    """Switch to an attention with masks of numbers where the model's own code reads them.

    Raises ModelError where the model's code fails, as some does with LoRA on all linear layers.
    """
    try:
        _probe_loss(engine, None, is_shared=False)
    except MaskUnsupported as problem:
        other = attention_of_transformers(engine)
        log.warning("Attention is computed for all pairs of tokens, with %s: %s", other, problem)
        engine.model.set_attn_implementation(other)
        engine.shares_prefixes = False
    except RecipeError:
        raise
    except Exception as error:  # the model's code and peft's raise anything
        adapted = f" with LoRA on {engine.model_config.target_modules}" if engine.model_config.lora_rank else ""
        hint = "; name its attention's linear layers in lora.target_modules" if adapted else ""
        raise ModelError(f"{type(engine.model).__name__} does not run{adapted}: {error}{hint}") from error


def _require_causality(engine: "SFTEngine") -> None:
    if _depends_on(engine, AFTERWARDS, is_shared=False):
        raise ModelError(
            f"{type(engine.model).__name__} predicts tokens from later ones, so that its loss means nothing: it is no "
            "causal model (models made from encoders need override_config={is_decoder: true})"
        )


def _is_isolated(engine: "SFTEngine", is_shared: bool) -> bool:
    """Whether the last of three documents keeps its loss when the one before it changes.

    Where documents 2 and 3 continue the first, it must change the loss.
    """
    try:
        return not _depends_on(engine, 1, is_shared) and (not is_shared or _depends_on(engine, 0, is_shared))
    except MaskUnsupported:  # of prefixes
        return False


def _depends_on(engine: "SFTEngine", changed: int, is_shared: bool) -> bool:
    """Whether the loss of the last of three documents changes with tokens of document `changed`, or AFTERWARDS.

    Compared to the last bit, except where experts multiply the tokens of all documents together. All ranks get the
    same answer: a part of a shared sequence may show what another does not.
    """
    unchanged = _probe_loss(engine, None, is_shared)
    difference = abs(_probe_loss(engine, changed, is_shared) - unchanged)
    if difference > 0 and _has_experts(engine):
        difference -= 0.01 * abs(_probe_loss(engine, 2, is_shared) - unchanged)
    return bool(largest(difference > 0))


def largest(number: int) -> int:
    """Return the largest number of all ranks."""
    found = torch.tensor(int(number), device=get_device_name())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def _has_experts(engine: "SFTEngine") -> bool:
    return any("expert" in name for name, _ in engine.module.named_modules())


def _probe_loss(engine: "SFTEngine", changed: int | None, is_shared: bool) -> float:
    """The loss of the last document's first tokens, where others differ: those of document `changed`, or AFTERWARDS."""
    size = SHORTEST
    first = Segment(0, size)
    prefix = (first,) if is_shared else ()
    segments = [first, Segment(size, 2 * size, prefix), Segment(2 * size, 3 * size, prefix)]
    ids = torch.arange(3 * size) * 7 % 31
    if changed is not None:
        begin, end = (2 * size + 5, 3 * size) if changed == AFTERWARDS else (changed * size, (changed + 1) * size)
        ids[begin:end] += 1
    probe = MicroBatch(
        segments=segments,
        input_ids=ids[None],
        position_ids=torch.cat([torch.arange(size) + segment.position for segment in segments])[None],
        positions=torch.arange(2 * size, 2 * size + 4),
        targets=torch.arange(4),
    )
    return float(engine.micro_batch_loss(probe, tokens=torch.ones((), dtype=torch.long))[0])
