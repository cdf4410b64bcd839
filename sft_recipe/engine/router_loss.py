"""The auxiliary loss that keeps the experts of a mixture busy to equal parts."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sft_recipe.engine import patches
from sft_recipe.errors import ModelError

ROUTER_LOGITS = "router_logits"


def router_loss(router_logits: Sequence[torch.Tensor], top_k: int, tokens: int) -> torch.Tensor:
    """Return the sum over layers of `experts x sum over experts of (share of choices x mean probability)`, in fp32.

    `router_logits` holds (rows, experts) for each layer, and the first `tokens` rows are those of tokens. Each token
    chooses `top_k` experts. A layer whose experts are used equally contributes `top_k`. This is the loss of the Switch
    Transformer (https://arxiv.org/abs/2101.03961, section 2.2); transformers takes both means over all layers together.
    """
    total = torch.zeros((), device=router_logits[0].device)
    for logits in router_logits:
        probs = F.softmax(logits.reshape(-1, logits.shape[-1])[:tokens].float(), dim=-1)
        choices = F.one_hot(probs.topk(top_k, dim=-1).indices, probs.shape[-1]).float()
        total = total + probs.shape[-1] * (choices.mean(0).sum(0) * probs.mean(0)).sum()
    return total


def router_coefficient(model: PreTrainedModel, wanted: float | None, has_separate_head: bool = True) -> float:
    """Return the coefficient of the loss: `wanted`, or the model's own where that is None; 0 without a router.

    Outputs of the body can be read where body and head are called separately (`has_separate_head`).

    Raises ModelError where it is wanted, but the model does not say how it chooses experts.
    """
    config = model.config.get_text_config()
    shows_router = any(ROUTER_LOGITS in patches.recorded_outputs(module) for module in model.modules())
    has_top_k = isinstance(getattr(config, "num_experts_per_tok", None), int)
    is_supported = shows_router and has_top_k and has_separate_head
    if wanted and not is_supported:
        raise ModelError(
            f"model.router_aux_loss_coef is {wanted:g}, but {type(model).__name__} has no experts whose router can be "
            "read; set it to null"
        )
    own = getattr(config, "router_aux_loss_coef", None) or 0.0
    return (own if wanted is None else wanted) if is_supported else 0.0
