"""The engine for encoder-decoder models: each document is a row with a source and a target, padded."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from verl.utils.device import get_device_name
from verl.workers.engine import EngineRegistry

from sft_recipe.engine.micro_batches import Document
from sft_recipe.engine.sft_engine import SFTEngine
from sft_recipe.models.families import SEQ2SEQ

NO_LABEL = -100  # as transformers marks what has no loss


@dataclass(frozen=True)
class PaddedBatch:
    """Input and targets of one forward pass; each row is a document.

    input_ids        a a a a     attention_mask   1 1 1 1     labels   A A -100     positions   0 1 3 4 5
                     b b 0 0                      1 1 0 0              B B B        targets     A A B B B
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor  # of labels with a loss, in the rows one after the other, (supervised,)
    targets: torch.Tensor  # the supervised tokens, (supervised,)


def pad(documents: Sequence[Document], pad_token_id: int) -> PaddedBatch:
    """Return one micro-batch; a document's target begins with its first supervised token.

    A document without a target, which fills an empty micro-batch, gets one position without a label.
    """
    sources, labels = [], []
    for ids, mask in documents:
        begin = int(mask.argmax()) if mask.any() else len(mask)
        sources.append(ids[:begin])
        label = ids[begin:].masked_fill(mask[begin:] == 0, NO_LABEL)
        labels.append(label if len(label) else ids.new_full((1,), NO_LABEL))
    padded = pad_sequence(labels, batch_first=True, padding_value=NO_LABEL)
    positions = (padded.flatten() != NO_LABEL).nonzero()[:, 0]  # here, where no GPU has to be waited for
    return PaddedBatch(
        input_ids=pad_sequence(sources, batch_first=True, padding_value=pad_token_id),
        attention_mask=pad_sequence([torch.ones_like(source) for source in sources], batch_first=True),
        labels=padded,
        positions=positions,
        targets=padded.flatten()[positions],
    )


@EngineRegistry.register(model_type=SEQ2SEQ.engine, backend=["fsdp", "fsdp2"], device="cpu")
@EngineRegistry.register(model_type=SEQ2SEQ.engine, backend=["fsdp", "fsdp2"], device="cuda", vendor=["nvidia", "amd"])
class Seq2SeqEngine(SFTEngine):
    """The SFT engine for models of an encoder and a decoder: nothing is packed, so nothing has to be isolated."""

    def pack(self, documents: Sequence[Document]) -> PaddedBatch:
        """Return the documents of a micro-batch as `micro_batch_loss` takes them."""
        return pad(documents, self.model.config.get_text_config(decoder=True).pad_token_id or 0)

    def micro_batch_loss(  # type: ignore[override]  # another kind of micro-batch
        self, micro_batch: PaddedBatch, tokens: torch.Tensor, ranks: int = 1, counts_correct: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and the number of correct tokens, as SFTEngine does."""
        device = get_device_name()
        input_ids, attention_mask, labels, positions, targets = (
            getattr(micro_batch, each.name).to(device, non_blocking=True) for each in fields(micro_batch)
        )
        model: Any = self.model
        with self.autocast():
            logits = self.module(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels=labels),
                use_cache=False,
            ).logits.flatten(0, 1)[positions]
        loss = F.cross_entropy(logits.float(), targets, reduction="sum") * (ranks / tokens.to(device).float())
        return loss, (logits.argmax(-1) == targets).sum()

    def _weights_of_root(self, model: PreTrainedModel) -> Sequence[nn.Parameter]:
        """The weights that several modules share: encoder, decoder and head use the same embeddings."""
        seen: set[nn.Parameter] = set()
        shared: list[nn.Parameter] = []
        for _, weight in model.named_parameters(remove_duplicate=False):
            if weight in seen:
                weight.grad_dtype = None  # FSDP1 on one GPU keeps gradients in the compute dtype between micro-batches
                shared.append(weight)
            seen.add(weight)
        return shared
