"""A model that returns its loss: head and cross-entropy a part of the tokens at a time, no tokens x vocabulary kept.

The gradients are computed in the forward, where each part's logits are at hand, as in Liger Kernel
(https://arxiv.org/abs/2410.10989, section 3.2). The logits are the model's own, whatever it does with its head's
outputs.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from sft_recipe.errors import ModelError

LOGITS_CHUNK = {"cpu": 2**25, "cuda": 2**28}  # logits at a time: few for the memory, many for the matrix products
SOFTMAX_CHUNK = {
    "cpu": 2**19,
    "cuda": 2**25,
}  # of those in fp32 at a time: few for a core's caches, many for a GPU's launches


def patch_chunked_cross_entropy(model: PreTrainedModel) -> list[nn.Parameter] | None:
    """Replace the forward of `model` by one that takes `positions` and `targets`, both (tokens,), and returns the loss.

    The loss is the negative log-likelihood of `targets` at `positions`, summed and multiplied by `scale` (a tensor with
    one number), in fp32. `positions` may name a position more than once. Differentiate
    it as it is: the head's weights may get their gradients before the backward pass.

    Returns the weights of the head, which must be unsharded wherever the model's own forward runs (else the new forward
    raises ModelError); returns None and changes nothing where body and head cannot be called separately.
    """
    prefix = model.base_model_prefix
    body, original = getattr(model, prefix, None), model.forward
    if body is None or body is model:
        return None

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        outputs = MoeModelOutputWithPast(last_hidden_state=hidden)
        with _forward(body, lambda *_, **__: outputs):
            return original(input_ids=hidden.new_zeros(1, 1, dtype=torch.long), use_cache=False).logits

    # Tied ones have a name in the body too.
    every = model.named_parameters(remove_duplicate=False)
    head = {weight: name for name, weight in every if not name.startswith(f"{prefix}.")}
    size = model.config.get_text_config().hidden_size
    try:
        with torch.enable_grad():
            found = logits(next(model.parameters()).new_zeros(1, 1, size))
        trained = [weight for weight in head if weight.requires_grad]
        gradients = torch.autograd.grad(found.sum(), trained, allow_unused=True) if trained else []
    except Exception:  # a forward that wants more of its body than the last hidden states
        return None
    vocabulary = found.shape[2]
    reached = {weight for weight, gradient in zip(trained, gradients, strict=True) if gradient is not None}
    shapes = {name: weight.shape for weight, name in head.items() if weight in reached}

    def forward(positions: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor, **inputs: Any) -> torch.Tensor:
        given = {name: value for name, value in inputs.items() if value is not None}
        hidden = body(**given).last_hidden_state[:, positions]
        weights = [attrgetter(name)(model) for name in shapes]  # as FSDP has put them for this forward
        for weight, (name, shape) in zip(weights, shapes.items(), strict=True):
            if isinstance(weight, DTensor) or weight.shape != shape:
                raise ModelError(f"{name} is sharded where the loss needs it whole, so that it would not be learnt")
        return _SummedCrossEntropy.apply(hidden, targets, scale, logits, vocabulary, torch.is_grad_enabled(), *weights)

    model.forward = forward
    return list(head)


class _SummedCrossEntropy(torch.autograd.Function):
    """scale * sum_i (log sum_v exp(logits[i, v]) - logits[i, targets[i]])"""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        scale: torch.Tensor,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        vocabulary: int,
        is_training: bool,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        trained = [weight for weight in weights if weight.requires_grad]
        losses, for_hidden = [], []
        sums: list[torch.Tensor | None] = [None] * len(trained)
        rows = max(1, LOGITS_CHUNK[hidden.device.type] // vocabulary)
        for part, target in zip(hidden.split(rows, dim=1), targets.split(rows), strict=True):
            saved: set[int] = set()
            with torch.set_grad_enabled(is_training), _watching_saved(saved):
                part = part.detach().requires_grad_(is_training)
                logits = logits_of(part)
            # In place of the logits, where their own backward does not ask for them.
            found = logits.detach()
            gradient = torch.empty_like(found) if _place(found) in saved else found
            losses.append(_loss_and_gradient(found[0], target, scale, gradient[0], is_training))
            if is_training:
                before = [_added(weight) for weight in trained]
                of_part, *of_trained = torch.autograd.grad(logits, [part, *trained], gradient, allow_unused=True)
                for weight, one, added in zip(trained, of_trained, before, strict=True):
                    if one is None and _added(weight) == added:
                        raise ModelError("the loss does not reach a weight of the head, so that it would not be learnt")
                for_hidden.append(of_part)
                sums = [_add(*pair) for pair in zip(sums, of_trained, strict=True)]
        if is_training:
            found = dict(zip(map(id, trained), sums, strict=True))
            of_weights = (found.get(id(weight)) for weight in weights)
            rounded = (None if part is None else part.to(hidden.dtype) for part in of_weights)
            ctx.save_for_backward(torch.cat(for_hidden, dim=1), *rounded)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [upstream] = gradients
        torch._assert_async(upstream == 1, "the loss was changed after its gradients were made")
        of_hidden, *of_weights = ctx.saved_tensors
        return of_hidden, *[None] * 5, *of_weights


def _added(weight: torch.Tensor) -> int:
    """How often a weight that sums its gradients elsewhere (whole.GradAccumulator) has been given one."""
    return weight.grad_accumulator.added if hasattr(weight, "grad_accumulator") else 0


def _loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor, gradient: torch.Tensor, is_training: bool
) -> torch.Tensor:
    """`scale` times the summed loss of logits (tokens, vocabulary); `gradient`, which may be the logits, gets as many
    times softmax(logits) less 1 at the target if `is_training`.
    """
    rows = max(1, SOFTMAX_CHUNK[logits.device.type] // logits.shape[1])
    losses = []
    for part, target, result in zip(
        logits.split(rows), targets[:, None].split(rows), gradient.split(rows), strict=True
    ):
        probs = F.log_softmax(part, dim=1, dtype=torch.float32)
        losses.append(-probs.gather(1, target).sum())
        if is_training:
            probs.exp_().scatter_add_(1, target, probs.new_full((1, 1), -1.0).expand_as(target))
            torch.mul(probs, scale, out=result)
    return torch.stack(losses).sum() * scale


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _watching_saved(places: set[int]) -> AbstractContextManager:
    """Adds the places of all that autograd saves for a backward."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        places.add(_place(tensor))
        return tensor.detach()  # what an operation gives must not keep the operation alive

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def _add(total: torch.Tensor | None, part: torch.Tensor | None) -> torch.Tensor | None:
    """In fp32 as soon as there are two."""
    return part if total is None or part is None else total.float().add_(part)


@contextmanager
def _forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Another forward for a module, as long as the context lasts."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
