"""A model that returns its loss: head and cross-entropy over a part of the tokens at a time.

No tensor of tokens x vocabulary is kept. The gradients are computed in the forward pass, while each part's logits
exist, as in Liger Kernel (https://arxiv.org/abs/2410.10989, section 3.2). The logits come from the model's own code, so
that scaling and soft-capping apply.
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

from sft_recipe.engine import patches
from sft_recipe.errors import ModelError
from sft_recipe.models.dims import LOGITS_CHUNK

# Elements per part of the softmax in fp32: few stay in a core's caches, and many save kernel launches on a GPU.
SOFTMAX_CHUNK = {"cpu": 2**19, "cuda": 2**25}


def patch_chunked_cross_entropy(model: PreTrainedModel) -> list[nn.Parameter] | None:
    """Let the forward of `model` take `positions` and `targets`, both (tokens,), and return the loss then.

    The loss is the negative log-likelihood of `targets` at `positions`, summed, times `ranks` and divided by `tokens`,
    in fp32. `tokens` is an integer tensor with one number: FSDP would round a floating input to the dtype that the
    model computes in. `positions` may contain a position more than once. Call backward on the loss times `loss_scale`,
    a number: the head's weights may get their gradients, scaled so, in the forward pass. The second value returned is,
    with `counts_correct`, the number of targets that have the largest logit. With `output_router_logits` those of each
    layer follow. Without `targets` the forward is the model's own.

    Returns the weights of the head, which must be unsharded wherever the model's own forward runs (else the new forward
    raises ModelError). Returns None and changes nothing where body and head cannot be called separately.
    """
    prefix, original = model.base_model_prefix, model.forward
    body = _body(model)
    if body is None:
        return None

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        outputs = MoeModelOutputWithPast(last_hidden_state=hidden)  # type: ignore[arg-type]
        with _use_forward(body, lambda *_, **__: outputs):
            return original(input_ids=hidden.new_zeros(1, 1, dtype=torch.long), use_cache=False).logits

    # Tied weights have a name in the body too.
    parameters = model.named_parameters(remove_duplicate=False)
    head = {weight: name for name, weight in parameters if not name.startswith(f"{prefix}.")}
    probed = _probe_head(model, logits_of, [weight for weight in head if weight.requires_grad])
    if probed is None:
        return None
    vocabulary, used = probed
    shapes = {name: weight.shape for weight, name in head.items() if weight in used}

    def forward(
        positions: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
        ranks: int = 1,
        loss_scale: float = 1.0,
        counts_correct: bool = False,
        **inputs: Any,
    ) -> Any:
        if positions is None or targets is None or tokens is None:
            return original(**inputs)
        given = {name: value for name, value in inputs.items() if value is not None}
        outputs = body(**given)
        hidden = outputs.last_hidden_state[:, positions]
        weights = [attrgetter(name)(model) for name in shapes]  # FSDP may have replaced them for this forward
        for weight, (name, shape) in zip(weights, shapes.items(), strict=True):
            if isinstance(weight, DTensor) or weight.shape != shape:
                raise ModelError(f"{name} is sharded where the loss needs all of it, so it would not be trained")
        scale = ranks / tokens.float()
        loss, correct = _SummedCrossEntropy.apply(
            hidden, targets, scale, loss_scale, logits_of, vocabulary, torch.is_grad_enabled(), counts_correct, *weights
        )
        return loss, correct, *(getattr(outputs, "router_logits", None) or ())

    model.forward = forward  # type: ignore[method-assign]
    return list(head)


def _probe_head(
    model: PreTrainedModel, logits_of: Callable[[torch.Tensor], torch.Tensor], trained: list[nn.Parameter]
) -> tuple[int, set[nn.Parameter]] | None:
    """The size of the vocabulary, and those of the `trained` weights of the head that logits depend on.

    None where the head needs more of the body's outputs than the last hidden states, or does not call the body.
    """
    hidden = next(model.parameters()).new_zeros(1, 2, model.config.get_text_config().hidden_size, requires_grad=True)
    try:
        with torch.enable_grad():
            logits = logits_of(hidden)
            _, *gradients = torch.autograd.grad(logits.sum(), [hidden, *trained], allow_unused=True)
    except Exception:  # the model's code raises anything
        return None
    if logits.shape[:2] != hidden.shape[:2]:
        return None
    return logits.shape[2], {
        weight for weight, gradient in zip(trained, gradients, strict=True) if gradient is not None
    }


def _body(model: PreTrainedModel) -> nn.Module | None:
    """The module that the model's forward calls for the hidden states; None where it computes them itself."""
    decoder, base = model.get_decoder(), getattr(model, model.base_model_prefix, None)
    body = base if decoder is model or decoder is None else decoder
    return None if body is model else body


class _SummedCrossEntropy(torch.autograd.Function):
    """scale * sum_i (log sum_v exp(logits[i, v]) - logits[i, targets[i]])"""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        scale: torch.Tensor,
        loss_scale: float,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        vocabulary: int,
        is_training: bool,
        counts_correct: bool,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        trained = [weight for weight in weights if weight.requires_grad]
        losses, grad_hidden = [], []
        correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        totals: list[torch.Tensor | None] = [None] * len(trained)
        rows = max(1, LOGITS_CHUNK[hidden.device.type] // vocabulary)
        for part, target in zip(hidden.split(rows, dim=1), targets.split(rows), strict=True):
            saved: set[int] = set()
            with torch.set_grad_enabled(is_training), _record_saved(saved):
                part = part.detach().requires_grad_(is_training)
                logits = logits_of(part)
            # The gradient overwrites the logits, unless their own backward needs them.
            values = logits.detach()
            if counts_correct:
                correct += (values[0].argmax(-1) == target).sum()
            gradient = torch.empty_like(values) if _address(values) in saved else values
            losses.append(_loss_and_gradient(values[0], target, scale, loss_scale, gradient[0], is_training))
            if is_training:
                before = [_accumulated(weight) for weight in trained]
                grad_part, *grads = torch.autograd.grad(logits, [part, *trained], gradient, allow_unused=True)
                for weight, grad, count in zip(trained, grads, before, strict=True):
                    if grad is None and _accumulated(weight) == count:
                        raise ModelError("the loss does not reach a weight of the head, so it would not be trained")
                grad_hidden.append(grad_part)
                totals = [_add(total, grad) for total, grad in zip(totals, grads, strict=True)]
        if is_training:
            by_weight = dict(zip(map(id, trained), totals, strict=True))
            grad_weights = (by_weight.get(id(weight)) for weight in weights)
            rounded = (None if grad is None else grad.to(hidden.dtype) for grad in grad_weights)
            ctx.save_for_backward(torch.cat(grad_hidden, dim=1), *rounded)
            ctx.loss_scale = loss_scale
        ctx.mark_non_differentiable(correct)
        return torch.stack(losses).sum(), correct

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        upstream, _ = gradients
        patches.assert_async(upstream == ctx.loss_scale, "the loss was changed after its gradients were computed")
        grad_hidden, *grad_weights = ctx.saved_tensors
        return grad_hidden, *[None] * 7, *grad_weights


def _accumulated(weight: torch.Tensor) -> int:
    """How many gradients a weight with a GradAccumulator (cpu/unsharded.py) has got in this step."""
    accumulator = getattr(weight, "grad_accumulator", None)
    return accumulator.added if accumulator else 0


def _loss_and_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    loss_scale: float,
    gradient: torch.Tensor,
    is_training: bool,
) -> torch.Tensor:
    """`scale` times the summed loss of logits (tokens, vocabulary).

    If `is_training`, writes `scale` times `loss_scale` times softmax(logits), less 1 at the target, to `gradient`,
    which may be the logits.
    """
    rows = max(1, SOFTMAX_CHUNK[logits.device.type] // logits.shape[1])
    losses = []
    parts = zip(logits.split(rows), targets[:, None].split(rows), gradient.split(rows), strict=True)
    for part, target, result in parts:
        probs = F.log_softmax(part, dim=1, dtype=torch.float32)
        losses.append(-probs.gather(1, target).sum())
        if is_training:
            probs.exp_().scatter_add_(1, target, probs.new_full((1, 1), -1.0).expand_as(target))
            torch.mul(probs, scale * loss_scale, out=result)
    return torch.stack(losses).sum() * scale


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _record_saved(addresses: set[int]) -> AbstractContextManager:
    """Inside, the addresses of all tensors that autograd saves for a backward pass are added to `addresses`."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        addresses.add(_address(tensor))
        return tensor.detach()  # an operation's output must not keep the operation alive

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def _add(total: torch.Tensor | None, part: torch.Tensor | None) -> torch.Tensor | None:
    """The sum, in fp32 as soon as there are two parts."""
    return part if total is None or part is None else total.float().add_(part)


@contextmanager
def _use_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Inside, `module` has another forward."""
    before = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before  # type: ignore[method-assign]
