"""Merges LoRA adapters into a model, and verifies that the result computes what the model with adapters computes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sft_recipe.engine.patches import build_adapters_in_one_thread
from sft_recipe.errors import ModelError, first_line
from sft_recipe.export.weights import Entry, StoredWeights
from sft_recipe.models.families import SEQ2SEQ, family_of

PROBE_TOKENS = 16
TOLERANCE = 1e-3  # of logits in fp32, relative to the largest
LAYER_TOLERANCE = 1e-4  # of one layer's outputs in fp32, relative to the largest


def merge_adapters(base: Any, adapter: Path) -> Any:
    """Return `base`, a model in fp32, with W + alpha / rank * B A for the adapters in the folder `adapter`.

    Raises ModelError where the merged model computes other logits than the one with adapters.
    """
    adapted: Any = load_adapters(base, adapter)
    expected = probe_logits(adapted)
    merged = adapted.merge_and_unload()
    require_same_logits(expected, probe_logits(merged), "merging the adapters")
    return merged


def load_adapters(base: Any, adapter: Path) -> Any:
    """Return `base` with the adapters of a folder, as a PeftModel in evaluation mode.

    The adapters are loaded without initial values, which would draw random numbers of a model that trains in another
    thread. Raises ModelError where they do not fit the model, and for a learned prompt, which is not in its layers.
    """
    from peft import PeftModel, get_peft_model_state_dict

    build_adapters_in_one_thread()
    try:
        weights = load_file(adapter / "adapter_model.safetensors")
        untie_where_adapted(base, weights)
        adapted: Any = PeftModel.from_pretrained(base, str(adapter), low_cpu_mem_usage=True, torch_device="cpu")
        if adapted.peft_config["default"].is_prompt_learning:
            raise ValueError("it is a learned prompt, not weights of layers")
        known = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        if unused := sorted(key for key in weights if key not in known and ".base_layer." not in key):
            raise ValueError(f"the base model has no place for {len(unused)} of its weights, such as {unused[0]}")
        return adapted.eval()
    except Exception as error:  # of safetensors, peft, and transformers
        raise ModelError(f"the adapter {adapter} cannot be loaded over its base model: {first_line(error)}") from None


class MergedWeights:
    """MergedWeights are a model's weights with its adapters merged, one layer at a time and in fp32.

    Each layer is verified: on random inputs the merged one computes what it computes with the adapters.
    """

    def __init__(self, stored: StoredWeights, model: Any, source: Path):
        """Take the base's weights `stored`, and `model`, which has the adapters of the folder `source` in it.

        Raises ModelError for kinds of adapters that cannot be merged, and where an adapted layer has other names in
        the files than in the model.
        """
        self.stored, self.source = stored, source
        self.layers = _adapted_layers(model, source)
        self.owners = {f"{layer}.{name}": layer for layer in self.layers for name in _inner(self.layers[layer])}
        self.untied = _untied_head(model, stored)
        self.merged: dict[str, torch.Tensor] = {}
        found = {
            f"{layer}.{name}": value for layer in self.layers for name, value in _inner(self.layers[layer]).items()
        }
        if unknown := found.keys() - stored.entries.keys() - self.untied.keys():
            raise ModelError(
                f"{source} adapts {min(unknown)}, which the base model's files store under another name, so that it "
                "cannot be merged layer by layer; train with --merge_lora, which merges in memory"
            )
        untied = {name: Entry(tuple(value.shape), value.dtype) for name, value in self.untied.items()}
        self.entries = stored.entries | untied

    def read(self, name: str) -> torch.Tensor:
        """Return a weight: in fp32 where its layer has adapters. Raises ModelError for a merge that is not exact."""
        if name not in self.owners:
            return self.untied[name] if name in self.untied else self.stored.read(name)
        if name not in self.merged:
            self.merged |= self._merge(self.owners[name])
        return self.merged.pop(name)

    def _merge(self, layer: str) -> dict[str, torch.Tensor]:
        module = self.layers[layer]
        if hasattr(module, "modules_to_save"):
            return {f"{layer}.{name}": value.float() for name, value in _inner(module).items()}
        before = {name: parameter.data for name, parameter in module.get_base_layer().named_parameters()}
        module.float()
        inputs = _probe_inputs(module.get_base_layer())
        try:
            with torch.no_grad():
                expected = module(inputs)
                module.merge(safe_merge=True)
                found = module(inputs)
        except Exception as error:  # each kind of adapter of peft has its own
            raise ModelError(f"{self.source}: {layer} cannot be merged: {first_line(error)}") from None
        if not (difference := relative_difference(expected, found)) <= LAYER_TOLERANCE:
            raise ModelError(f"{self.source}: merging {layer} changed what it computes by {100 * difference:.2g}%")
        merged = {f"{layer}.{name}": value.detach() for name, value in _inner(module).items()}
        for name, parameter in module.get_base_layer().named_parameters():
            parameter.data = before[name]  # mapped from the file, so that the merged copy can be released
        module.merged_adapters.clear()
        return merged


def _adapted_layers(model: Any, source: Path) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
    from transformers.pytorch_utils import Conv1D

    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        is_copy = isinstance(module, ModulesToSaveWrapper)
        is_known = isinstance(module, BaseTunerLayer) and isinstance(
            module.get_base_layer(), torch.nn.Linear | torch.nn.Embedding | Conv1D
        )
        if not (is_copy or is_known):
            raise ModelError(f"{source}: adapters of the kind {type(module).__name__} ({name}) cannot be merged")
        layers[name] = module
    return layers


def _inner(module: Any) -> dict[str, torch.Tensor]:
    """Return the weights of an adapted layer by their names in a model without adapters."""
    copies = getattr(module, "modules_to_save", None)
    layer = copies[module.active_adapters[0]] if copies is not None else module.get_base_layer()
    return dict(layer.named_parameters())


def _untied_head(model: Any, stored: StoredWeights) -> dict[str, torch.Tensor]:
    """Return the head's weight by its name where the files do not hold it since it was that of the embeddings."""
    head = model.get_output_embeddings()
    if head is None or model.config.tie_word_embeddings:
        return {}
    name = next(f"{name}.weight" for name, module in model.named_modules() if module is head)
    return {} if name in stored.entries else {name: getattr(head, "base_layer", head).weight.detach()}


def _probe_inputs(layer: torch.nn.Module) -> torch.Tensor:
    if isinstance(layer, torch.nn.Embedding):
        return torch.arange(min(PROBE_TOKENS, layer.num_embeddings))
    weight: Any = layer.weight
    width = weight.shape[1] if isinstance(layer, torch.nn.Linear) else weight.shape[0]  # of a Conv1D
    return torch.randn(PROBE_TOKENS, width, generator=torch.Generator().manual_seed(0))


def untie_where_adapted(model: Any, adapter: Mapping[str, torch.Tensor]) -> None:
    """Give the head separate weights where it shares them with the embeddings and one of the two has adapters.

    Merged into the shared weights, the adapters of one would change the other.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    names = [name for name, module in model.named_modules() if module is head or module is embeddings]
    if any(f".{name}.lora_" in key or key.endswith(f"model.{name}.weight") for name in names for key in adapter):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def probe_logits(model: Any) -> torch.Tensor:
    """Return the model's logits for PROBE_TOKENS tokens of its vocabulary, (tokens, vocabulary).

    An encoder-decoder gets them as source and as target.
    """
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = (torch.arange(PROBE_TOKENS) * (vocabulary // PROBE_TOKENS))[None]
    targets = {"decoder_input_ids": ids} if family_of(model.config) is SEQ2SEQ else {}
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **targets).logits[0].float()


def require_same_logits(expected: torch.Tensor, found: torch.Tensor, action: str) -> None:
    """Raise ModelError where logits in fp32 differ by more than rounding; `action` is what was done between them."""
    difference = relative_difference(expected, found)
    if not difference <= TOLERANCE:
        raise ModelError(
            f"{action} changed the model's logits by {100 * difference:.2g}%, so the result is not the trained model; "
            "the adapter and the resumable state are saved"
        )


def relative_difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest expected value."""
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-6))
