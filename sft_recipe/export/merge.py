"""Merges LoRA adapters into a model, and verifies that the result computes what the model with adapters computes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sft_recipe.errors import ModelError

PROBE_TOKENS = 16
TOLERANCE = 1e-3  # of logits in fp32, relative to the largest


def merge_adapters(base: Any, adapter: Path) -> Any:
    """Return `base`, a model in fp32, with W + alpha / rank * B A for the adapters in the folder `adapter`.

    The adapters are loaded without initial values, which would draw random numbers. Raises ModelError where the merged
    model computes other logits than the one with adapters.
    """
    from peft import PeftModel

    untie_where_adapted(base, load_file(adapter / "adapter_model.safetensors"))
    adapted: Any = PeftModel.from_pretrained(base, str(adapter), low_cpu_mem_usage=True).eval()
    expected = probe_logits(adapted)
    merged = adapted.merge_and_unload()
    require_same_logits(expected, probe_logits(merged), "merging the adapters")
    return merged


def untie_where_adapted(model: Any, adapter: Mapping[str, torch.Tensor]) -> None:
    """Give the head separate weights where it shares them with the embeddings and one of the two has adapters.

    Merged into the shared weights, the adapters of one would change the other.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    names = [name for name, module in model.named_modules() if module is head or module is embeddings]
    if any(f".{name}.lora_" in key for name in names for key in adapter):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def probe_logits(model: Any) -> torch.Tensor:
    """Return the model's logits for PROBE_TOKENS tokens of its vocabulary, (tokens, vocabulary)."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(PROBE_TOKENS) * (vocabulary // PROBE_TOKENS)
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0].float()


def require_same_logits(expected: torch.Tensor, found: torch.Tensor, action: str) -> None:
    """Raise ModelError where logits in fp32 differ by more than rounding; `action` is what was done between them."""
    difference = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not difference <= TOLERANCE:
        raise ModelError(
            f"{action} changed the model's logits by {100 * difference:.2g}%, so the result is not the trained model; "
            "the adapter and the resumable state are saved"
        )
