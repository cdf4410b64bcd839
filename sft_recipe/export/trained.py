"""The trained model that is exported, mapped from its files rather than loaded into memory."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from sft_recipe.errors import ModelError, first_line
from sft_recipe.export.generation import generation_settings, turn_end_ids
from sft_recipe.export.merge import MergedWeights, load_adapters
from sft_recipe.export.source import Source
from sft_recipe.export.weights import DTYPES, StoredWeights, Weights, entry_bytes
from sft_recipe.models.hf_config import load_hf_config
from sft_recipe.models.loading import load_model


@dataclass(frozen=True)
class TrainedModel:
    """A TrainedModel is in the dtype of its files; with an adapter, `model` has it in its layers."""

    source: Source
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    model: Any
    stored: StoredWeights

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

    def generation_settings(self) -> dict[str, Any]:
        """Return the content of generation_config.json, with the tokens that end a turn. Raises ModelError."""
        origin = self.source.tokenizer
        if not (origin / GENERATION_CONFIG_NAME).is_file():
            origin = self.source.base.folder
        return generation_settings(origin, self.config, turn_end_ids(self.tokenizer))


def load_trained(source: Source) -> TrainedModel:
    """Return the trained model. Raises ModelError where a part cannot be loaded."""
    settings = source.settings
    if source.adapter is None:  # the overrides of its run are in its config.json
        settings = settings.model_copy(update={"override_config": {}})
    config = load_hf_config(settings, source.base)
    tokenizer = load_exported_tokenizer(source.tokenizer, settings.trust_remote_code)
    stored = StoredWeights(source.base.folder)
    dtype = DTYPES.get(_main_dtype(stored), torch.float32)
    model: Any = load_model(source.base.folder, config, dtype, settings.trust_remote_code).eval()
    if source.adapter:
        model = load_adapters(model, source.adapter).get_base_model()
    return TrainedModel(source, config, tokenizer, model, stored)


def load_exported_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder as it is. Raises ModelError."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{folder} holds no usable tokenizer: {first_line(error)}") from None


def _main_dtype(weights: Weights) -> str:
    sizes: Counter[torch.dtype] = Counter()
    for entry in weights.entries.values():
        sizes[entry.dtype] += entry_bytes(entry, entry.dtype)
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
