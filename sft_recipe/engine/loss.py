"""Cross-entropy in fp32 that keeps nothing of the size of the logits but the logits.

`F.cross_entropy(logits.float(), ...)` holds five more such arrays at its peak, four of them in fp32: the cast, the
log-softmax, two gradients of theirs, and the gradient of the logits. Here the fp32 part is a few rows at a time, in the
forward for the log-sum-exp and again in the backward; what is left is the logits and their gradient in their own dtype.
"""

from typing import Any

import torch

CHUNK = {"cpu": 2**19, "cuda": 2**25}  # fp32 numbers at a time: few for a core's caches, many for a GPU's launches


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of targets (tokens,) under logits (tokens, vocabulary), summed, in fp32.

    sum_i (log sum_v exp(logits[i, v]) - logits[i, targets[i]])
    """
    return _SummedCrossEntropy.apply(logits, targets)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        log_sums = torch.cat([part.float().logsumexp(dim=1) for part in logits.split(_rows(logits))])
        ctx.save_for_backward(logits, targets, log_sums)
        return (log_sums - logits.gather(1, targets[:, None])[:, 0].float()).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """softmax(logits), less 1 at the target, times the gradient of the sum."""
        logits, targets, log_sums = ctx.saved_tensors
        [upstream] = gradients
        result = torch.empty_like(logits)
        rows = _rows(logits)
        parts = (whole.split(rows) for whole in (logits, targets[:, None], log_sums[:, None], result))
        for part, target, log_sum, out in zip(*parts, strict=True):
            share = (part.float() - log_sum).exp_()
            share.scatter_add_(1, target, share.new_full((1, 1), -1.0).expand_as(target))
            out.copy_(share.mul_(upstream))
        return result, None


def _rows(logits: torch.Tensor) -> int:
    return max(1, CHUNK.get(logits.device.type, CHUNK["cuda"]) // logits.shape[1])
