"""Greedy decoding with the model that is being trained, on all ranks: padded batches and a KV cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput
from verl.utils.device import get_device_name

from sft_recipe.engine import patches
from sft_recipe.engine.model_checks import accepts, attention_of_transformers, evaluating, largest
from sft_recipe.models.families import SEQ2SEQ, family_of

if TYPE_CHECKING:
    from sft_recipe.engine.sft_engine import SFTEngine


def greedy(
    engine: "SFTEngine", prompts: Sequence[Sequence[int]], max_new_tokens: int, end_ids: Sequence[int], tokens: int
) -> list[list[int]]:
    """Return the continuation of each of this rank's prompts, in order, up to and including the token that ends it.

    Without one of `end_ids` a continuation has `max_new_tokens` tokens. A batch holds about `tokens` tokens, answers
    counted. Collective: ranks may have different numbers of prompts, but all run the model equally often, as FSDP
    needs.
    """
    answers: dict[int, list[int]] = {}
    batches = list(_batches(prompts, max_new_tokens, tokens))
    count = largest(len(batches))
    with evaluating(engine), engine.uncompiled(), _attention_with_cache(engine):
        for number in range(count):
            indices = batches[number] if number < len(batches) else []
            chosen = [prompts[index] for index in indices] or [[0]]  # nothing, for ranks that are done
            found = _decode(engine, chosen, max_new_tokens if indices else 0, set(end_ids))
            answers |= dict(zip(indices, found, strict=False))
    return [answers[index] for index in range(len(prompts))]


def _batches(prompts: Sequence[Sequence[int]], max_new_tokens: int, tokens: int) -> Iterator[list[int]]:
    """Indices of prompts of about the same length, longest first: what does not fit fails at once."""
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
        longest = len(prompts[batch[0]]) if batch else len(prompts[index])
        if batch and (len(batch) + 1) * (longest + max_new_tokens) > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _decode(
    engine: "SFTEngine", prompts: Sequence[Sequence[int]], max_new_tokens: int, end_ids: set[int]
) -> list[list[int]]:
    """Continue one batch; all ranks go on until the last of them has ended."""
    is_seq2seq = family_of(engine.model.config) is SEQ2SEQ
    next_logits = _target_logits(engine, prompts) if is_seq2seq else _continuation_logits(engine, prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    tokens: torch.Tensor | None = None
    while largest(any(_is_open(answer, max_new_tokens, end_ids) for answer in answers)):
        engine.on_micro_batch()
        with engine.autocast():
            tokens = next_logits(tokens).float().argmax(-1)
        for answer, token in zip(answers, tokens.tolist(), strict=True):
            if _is_open(answer, max_new_tokens, end_ids):
                answer.append(token)
    return answers


# The tokens (rows,) chosen last, None at first -> logits (rows, vocabulary) of the next ones.
NextLogits = Callable[[torch.Tensor | None], torch.Tensor]


def _continuation_logits(engine: "SFTEngine", prompts: Sequence[Sequence[int]]) -> NextLogits:
    """Of a decoder, which continues its prompts."""
    device, width = get_device_name(), max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    cache: Any = DynamicCache(config=engine.model.config.get_text_config())
    chosen = {"logits_to_keep": 1} if accepts(engine.model, "logits_to_keep") else {}

    def next_logits(tokens: torch.Tensor | None) -> torch.Tensor:
        nonlocal mask, cache
        inputs = ids if tokens is None else tokens[:, None]
        mask = mask if tokens is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = engine.module(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            **chosen,
        )
        cache = output.past_key_values
        return output.logits[:, -1]

    return next_logits


def _target_logits(engine: "SFTEngine", sources: Sequence[Sequence[int]]) -> NextLogits:
    """Of an encoder-decoder, whose encoder reads the sources once."""
    batch = engine.pack([(torch.tensor(source), torch.zeros(len(source))) for source in sources])
    mask = batch.attention_mask.to(get_device_name())
    encoded: dict[str, Any] = {"input_ids": batch.input_ids.to(get_device_name())}
    labels = torch.zeros(len(sources), 1, dtype=torch.long, device=mask.device)
    model: Any = engine.model
    start = model.prepare_decoder_input_ids_from_labels(labels=labels)

    def next_logits(tokens: torch.Tensor | None) -> torch.Tensor:
        inputs = start if tokens is None else tokens[:, None]
        output = engine.module(**encoded, attention_mask=mask, decoder_input_ids=inputs, use_cache=True)
        states = BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
        encoded.clear()
        encoded.update(encoder_outputs=states, past_key_values=output.past_key_values)
        return output.logits[:, -1]

    return next_logits


def _is_open(answer: list[int], max_new_tokens: int, end_ids: set[int]) -> bool:
    return len(answer) < max_new_tokens and not (answer and answer[-1] in end_ids)


@contextmanager
def _attention_with_cache(engine: "SFTEngine") -> Iterator[None]:
    """Inside, the model attends as transformers does: that of packed documents knows no cache."""
    used = patches.attention_implementation(engine.model.config)
    engine.model.set_attn_implementation(attention_of_transformers(engine))
    try:
        yield
    finally:
        engine.model.set_attn_implementation(used)
