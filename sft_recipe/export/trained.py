"""The trained model that is exported, mapped from its files rather than loaded into memory."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from sft_recipe.errors import ModelError
from sft_recipe.export.generation import generation_settings, turn_end_ids
from sft_recipe.export.merge import MergedWeights, load_adapters
from sft_recipe.export.source import ADAPTER_WEIGHTS, Source
from sft_recipe.export.weights import DTYPES, StoredWeights, Weights, entry_bytes
from sft_recipe.models.hf_config import load_hf_config
from sft_recipe.models.loading import load_model
from sft_recipe.models.quantization import base_dtype, round_weight, round_weights
from sft_recipe.models.tokenizer import read_tokenizer


@dataclass(frozen=True)
class TrainedModel:
    """A TrainedModel is in the dtype of its files; with an adapter, `model` has it in its layers.

    An adapter that was trained over weights in 4 bits is over what training saw of them, computed in `quantized_in`.
    """

    source: Source
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    model: Any
    stored: StoredWeights
    quantized_in: torch.dtype | None = None

    @property
    def trusts_code(self) -> bool:
        """Return whether code that comes with the model may run."""
        return self.source.settings.trust_remote_code

    @property
    def dtype(self) -> str:
        """The name of the dtype that most bytes of the stored weights have."""
        return _main_dtype(self.stored)

    def weights(self) -> Weights:
        """Return the weights of the complete model, with the adapter merged. Raises ModelError where that fails."""
        adapter = self.source.adapter
        return MergedWeights(self.stored, self.model, adapter) if adapter else self.stored

    def load_base(self) -> Any:
        """Return the base model of an adapter, as it was trained over, for another adapter. Raises ModelError."""
        return _load_base(self.source, self.config, self.model.dtype, self.quantized_in)[0]

    def generation_settings(self) -> dict[str, Any]:
        """Return the content of generation_config.json, with the tokens that end a turn. Raises ModelError."""
        origin = self.source.tokenizer
        if not (origin / GENERATION_CONFIG_NAME).is_file():
            origin = self.source.base.folder
        return generation_settings(origin, self.config, turn_end_ids(self.tokenizer))


def load_trained(source: Source) -> TrainedModel:
    """Return the trained model. Raises ModelError where a part cannot be loaded."""
    settings, config = source.settings, trained_config(source)
    tokenizer = read_tokenizer(source.tokenizer, source.base.name, settings.trust_remote_code)
    stored = StoredWeights(source.base.folder)
    dtype = DTYPES.get(_main_dtype(stored), torch.float32)
    quantized_in = base_dtype(source.adapter / ADAPTER_WEIGHTS) if source.adapter else None
    model, rounded = _load_base(source, config, dtype, quantized_in)
    if quantized_in:
        stored = RoundedWeights(source.base.folder, rounded, quantized_in)
    if source.adapter:
        model = load_adapters(model, source.adapter).get_base_model()
    return TrainedModel(source, config, tokenizer, model, stored, quantized_in)


def _load_base(
    source: Source, config: PretrainedConfig, dtype: torch.dtype, quantized_in: torch.dtype | None
) -> tuple[Any, list[str]]:
    """Returns the model without an adapter, and the names of the weights that were rounded to 4 bits."""
    model: Any = load_model(source.base.folder, config, dtype, source.settings.trust_remote_code).eval()
    return model, round_weights(model, quantized_in) if quantized_in else []


class RoundedWeights(StoredWeights):
    """RoundedWeights are those of a model folder, some of them as training in 4 bits saw them."""

    def __init__(self, folder: Path, rounded: Collection[str], dtype: torch.dtype):
        """Raises ModelError where the files have one of the `rounded` under another name."""
        super().__init__(folder)
        self.rounded, self.dtype = rounded, dtype
        if unknown := set(rounded) - self.entries.keys():
            raise ModelError(
                f"{folder} stores {min(unknown)} under another name, so that it cannot be merged layer by layer; train "
                "with --merge_lora, which merges in memory"
            )

    def read(self, name: str) -> torch.Tensor:
        """Return a weight."""
        weight = super().read(name)
        return round_weight(weight, self.dtype) if name in self.rounded else weight


def trained_config(source: Source) -> PretrainedConfig:
    """Return the configuration of the trained model. Raises ModelError where it cannot be used."""
    settings = source.settings
    if source.adapter is None:  # the overrides of its run are in its config.json
        settings = settings.model_copy(update={"override_config": {}})
    return load_hf_config(settings, source.base)


def _main_dtype(weights: Weights) -> str:
    sizes: Counter[torch.dtype] = Counter()
    for entry in weights.entries.values():
        sizes[entry.dtype] += entry_bytes(entry, entry.dtype)
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
