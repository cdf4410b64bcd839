"""Verifies an export: the logits and the greedy choices of the loaded export against those of the trained model."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sft_recipe.errors import ModelError, first_line
from sft_recipe.models.families import SEQ2SEQ, decoder_start_token_id, family_of

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
# Logits may differ by FP32 of their size, or by ROUNDINGS times what rounding the export's weights once more changes.
FP32 = 1e-3
ROUNDINGS = 2.5
FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "f16": torch.float16}
Q8_BLOCK = 32
FINER = {"float16": "--dtype float32", "bfloat16": "--dtype float32", "q8_0": "--quant f16"}  # what rounds less


@dataclass(frozen=True)
class Reference:
    """A Reference holds what the trained model computes: its greedy answers to PROMPTS, and the logits of these.

    `inputs` are those of the model's forward: `input_ids` and `attention_mask` (prompts, tokens), padded on the left,
    and `decoder_input_ids` of an encoder-decoder. `logits` are (prompts, NEW_TOKENS, vocabulary) and belong to the last
    NEW_TOKENS tokens.
    """

    prompts: list[list[int]]
    inputs: dict[str, torch.Tensor]
    logits: torch.Tensor


@dataclass(frozen=True)
class Verification:
    """A Verification compares an export with the trained model, on `tokens` greedy tokens of `prompts` answers.

    `relative_difference` of the logits and its `bound` are root mean squares, relative to that of the logits.
    `is_rounding`: it is above the bound, and the trained model with rounded weights computes what the export computes.
    """

    prompts: int
    tokens: int
    largest_difference: float
    relative_difference: float
    bound: float
    same_choices: int
    is_rounding: bool

    def __str__(self) -> str:
        cause = "; above it by rounding alone: the rounded checkpoint computes the same" if self.is_rounding else ""
        return (
            f"over {self.prompts} prompts logits differ by {100 * self.relative_difference:.2g}% (bound "
            f"{100 * self.bound:.2g}%{cause}), one by {self.largest_difference:.3g}, and {self.same_choices} of "
            f"{self.tokens} greedy tokens are the same"
        )


def make_reference(model: Any, tokenizer: PreTrainedTokenizerBase) -> Reference:
    """Return the greedy answers of the trained model, computed in fp32. Raises ModelError where it is not finite."""
    prompts = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generation_config = GenerationConfig()  # no end tokens: all answers have the same length
    is_seq2seq = family_of(model.config) is SEQ2SEQ
    start = decoder_start_token_id(model.config) if is_seq2seq else None
    greedy = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, decoder_start_token_id=start)
    with computed_in_fp32(model):
        answers = model.generate(ids, attention_mask=mask, generation_config=greedy)
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": answers}
        if not is_seq2seq:
            inputs = {"input_ids": answers, "attention_mask": torch.nn.functional.pad(mask, (0, NEW_TOKENS), value=1)}
        logits = _answer_logits(model, inputs)
    if not torch.isfinite(logits).all():
        raise ModelError("the trained model computes logits that are not finite (NaN or infinite): nothing to export")
    return Reference(prompts, inputs, logits)


def verify_export(model: Any, reference: Reference, kind: str, trained: Any = None) -> Verification:
    """Compare an export, loaded back, with the trained model; `kind` is how its weights were rounded (`rounded`).

    Where rounding undoes changes of training that are smaller than its steps, logits differ by more than its errors
    explain. Then a complete model, `trained`, has to compute the same with rounded weights. Raises ModelError where
    logits differ by more.
    """
    with computed_in_fp32(model):
        logits = _answer_logits(model, reference.inputs)
    if logits.shape != reference.logits.shape:
        raise ModelError(
            f"the export has a vocabulary of {logits.shape[-1]}, the trained model one of {reference.logits.shape[-1]}"
        )
    same, difference = logits.argmax(-1) == reference.logits.argmax(-1), logits - reference.logits
    size, rounding, is_rounding = _root_mean_square(reference.logits), 0.0, False
    if kind != "float32":
        with computed_in_fp32(model, kind):
            rounding = _root_mean_square(_answer_logits(model, reference.inputs) - logits)
    relative, bound = _root_mean_square(difference) / size, max(FP32, ROUNDINGS * rounding / size)
    if relative > bound and trained is not None and kind in FLOATS:
        with computed_in_fp32(trained, kind, is_stored=True):
            expected = _answer_logits(trained, reference.inputs)
        is_rounding = _root_mean_square(logits - expected) <= FP32 * size
    result = Verification(
        prompts=len(reference.prompts),
        tokens=same.numel(),
        largest_difference=float(difference.abs().max()),
        relative_difference=relative,
        bound=bound,
        same_choices=int(same.sum()),
        is_rounding=is_rounding,
    )
    if not (relative <= bound or is_rounding):
        advice = f". If this is the rounding to {kind}, {FINER[kind]} passes" if kind in FINER else ""
        raise ModelError(f"the export is not the trained model, and was removed: {result}{advice}")
    return result


def rounding_remark(dtype: str, kind: str) -> str:
    """Return what users should know of an export whose difference is rounding, more of it than its weights explain."""
    return (
        f"Much of what training changed is less than a step of {dtype}, and is lost in this export; "
        f"{FINER.get(kind, '--format hf --dtype float32')} keeps it."
    )


def _root_mean_square(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt().clamp(min=1e-12))


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
    """Return a prompt as the model gets it for an answer; the prompt alone without a chat template.

    Raises ModelError where the template cannot render it.
    """
    if not tokenizer.chat_template:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # of Jinja, or of what the template does
        name = tokenizer.name_or_path
        raise ModelError(f"the chat template of {name} cannot render a question: {first_line(error)}") from None


@contextmanager
def computed_in_fp32(model: Any, kind: str = "float32", is_stored: bool = False) -> Iterator[None]:
    """Inside, each layer computes in fp32: its weights are converted, and rounded, for its forward pass only.

    If `is_stored`, a float of this kind stores them, else they are rounded as `rounded` does.

    Weights that are mapped from files stay there, so that memory holds the largest layer rather than the model.
    """
    handles: list[Any] = []
    stored: dict[torch.nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def convert(module: torch.nn.Module, *_: Any) -> None:
        stored[module] = [(tensor, tensor.data) for tensor in converted[module]]
        for tensor, data in stored[module]:
            tensor.data = _stored(data.float(), kind) if is_stored else rounded(data.float(), kind)

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for tensor, data in stored.pop(module):
            tensor.data = data

    converted = {module: _converted(module, kind) for module in model.modules()}
    for module in converted:
        if converted[module]:
            handles.append(module.register_forward_pre_hook(convert))
            handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _converted(module: torch.nn.Module, kind: str) -> list[torch.Tensor]:
    """Return what is in less precision than fp32, and all weights where `kind` rounds them."""
    low = torch.bfloat16, torch.float16
    weights = [tensor for tensor in module.parameters(recurse=False) if tensor.is_floating_point()]
    converted = [tensor for tensor in weights if tensor.dtype in low or kind != "float32"]
    return [*converted, *(buffer for buffer in module.buffers(recurse=False) if buffer.dtype in low)]


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a weight with about the errors that storing it in `kind` causes, also where it has been stored so.

    For that the grid is another one: that of bf16 and fp16 is shifted, that of q8_0 has 113 steps instead of 127.
    """
    if kind in FLOATS:
        return _stored(weight / math.sqrt(2), kind) * math.sqrt(2)
    if kind == "q8_0" and weight.ndim > 1 and weight.shape[-1] % Q8_BLOCK == 0:
        blocks = weight.reshape(-1, Q8_BLOCK)
        step = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30) / 113
        return ((blocks / step).round() * step).view_as(weight)
    return weight


def _stored(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a weight as a float of this kind stores it; a GGUF file has its vectors in fp32."""
    return weight if kind == "f16" and weight.ndim == 1 else weight.to(FLOATS[kind]).float()


def _answer_logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits that predict the last NEW_TOKENS tokens of each row: (rows, NEW_TOKENS, vocabulary)."""
    known = inspect.signature(model.forward).parameters
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    placed = {"position_ids": positions} if "position_ids" in known else {}
    kept = {"logits_to_keep": NEW_TOKENS + 1} if "logits_to_keep" in known else {}
    logits = model(**inputs, use_cache=False, **placed, **kept).logits
    return logits[:, -NEW_TOKENS - 1 : -1].float()
