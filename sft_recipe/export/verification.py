"""Verifies an export: the logits and the greedy choices of the loaded export against those of the trained model."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sft_recipe.errors import ModelError
from sft_recipe.export.merge import relative_difference

NEW_TOKENS = 16  # greedy tokens of each answer
PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "Explain in one sentence what machine learning is.",
    "List three kinds of fruit.",
    "请用一句话解释什么是人工智能。",
    "把“早上好”翻译成英文。",
    "What is 12 times 7?",
    "Write a short poem about spring.",
)
# The largest difference of a logit, relative to the largest logit, that rounding weights to a type explains.
BOUNDS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "f16": 1e-2, "q8_0": 1e-1}


@dataclass(frozen=True)
class Reference:
    """A Reference holds what the trained model computes: its greedy answers to PROMPTS, and the logits of these.

    `ids` and `mask` are (prompts, tokens), padded on the left; `logits` are (prompts, NEW_TOKENS, vocabulary) and
    belong to the last NEW_TOKENS tokens.
    """

    prompts: list[list[int]]
    ids: torch.Tensor
    mask: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class Verification:
    """A Verification compares an export with the trained model, on `tokens` greedy tokens of `prompts` answers."""

    prompts: int
    tokens: int
    largest_difference: float
    relative_difference: float
    bound: float
    same_choices: int

    def __str__(self) -> str:
        return (
            f"over {self.prompts} prompts the largest difference of a logit is {self.largest_difference:.3g} "
            f"({100 * self.relative_difference:.2g}% of the largest logit; bound {100 * self.bound:g}%), and "
            f"{self.same_choices} of {self.tokens} greedy tokens are the same"
        )


def make_reference(model: Any, tokenizer: PreTrainedTokenizerBase) -> Reference:
    """Return the greedy answers of the trained model, computed in fp32. Raises ModelError where it is not finite."""
    prompts = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generation_config = GenerationConfig()  # no end tokens: all answers have the same length
    greedy = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    with computed_in_fp32(model):
        ids = model.generate(ids, attention_mask=mask, generation_config=greedy)
        mask = torch.nn.functional.pad(mask, (0, NEW_TOKENS), value=1)
        logits = _answer_logits(model, ids, mask)
    if not torch.isfinite(logits).all():
        raise ModelError("the trained model computes logits that are not finite (NaN or infinite): nothing to export")
    return Reference(prompts, ids, mask, logits)


def verify_export(model: Any, reference: Reference, kind: str) -> Verification:
    """Compare an export, loaded back, with the trained model; `kind` is a key of BOUNDS.

    Raises ModelError where a logit differs by more than the bound.
    """
    with computed_in_fp32(model):
        logits = _answer_logits(model, reference.ids, reference.mask)
    if logits.shape != reference.logits.shape:
        raise ModelError(
            f"the export has a vocabulary of {logits.shape[-1]}, the trained model one of {reference.logits.shape[-1]}"
        )
    same = logits.argmax(-1) == reference.logits.argmax(-1)
    result = Verification(
        prompts=len(reference.prompts),
        tokens=same.numel(),
        largest_difference=float((logits - reference.logits).abs().max()),
        relative_difference=relative_difference(reference.logits, logits),
        bound=BOUNDS[kind],
        same_choices=int(same.sum()),
    )
    if not result.relative_difference <= result.bound:
        raise ModelError(f"the export is not the trained model, and was removed: {result}")
    return result


def verify_tokens(prompt_ids: Callable[[str], list[int]], reference: Reference) -> None:
    """Raise ModelError where an exported tokenizer encodes one of PROMPTS differently from the trained model's."""
    for prompt, expected in zip(PROMPTS, reference.prompts, strict=True):
        if (found := prompt_ids(prompt)) != expected:
            raise ModelError(
                f"the exported tokenizer is not the trained model's: it encodes {prompt!r} as {found[:8]}... instead "
                f"of {expected[:8]}..."
            )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the tokens of a prompt as the model gets them for an answer."""
    text = prompt_text(tokenizer, prompt)
    return list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return a prompt as the model gets it for an answer; the prompt alone without a chat template."""
    if not tokenizer.chat_template:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@contextmanager
def computed_in_fp32(model: Any) -> Iterator[None]:
    """Inside, each layer computes in fp32: its weights are converted for its forward pass only.

    Weights that are mapped from files stay there, so that memory holds the largest layer rather than the model.
    """
    handles: list[Any] = []
    stored: dict[torch.nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def convert(module: torch.nn.Module, *_: Any) -> None:
        stored[module] = [(tensor, tensor.data) for tensor in _low_precision(module)]
        for tensor, data in stored[module]:
            tensor.data = data.float()

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for tensor, data in stored.pop(module):
            tensor.data = data

    for module in model.modules():
        if _low_precision(module):
            handles.append(module.register_forward_pre_hook(convert))
            handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _low_precision(module: torch.nn.Module) -> list[torch.Tensor]:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return [tensor for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]


def _answer_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the logits that predict the last NEW_TOKENS tokens of each row: (rows, NEW_TOKENS, vocabulary)."""
    known = inspect.signature(model.forward).parameters
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if "position_ids" in known else {}
    kept = {"logits_to_keep": NEW_TOKENS + 1} if "logits_to_keep" in known else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions, **kept).logits
    return logits[:, -NEW_TOKENS - 1 : -1].float()
