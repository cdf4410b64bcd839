"""T5 models whose head is not their embeddings, such as FLAN-T5 and mT5.

Their files decide: transformers reads the config.json of every T5 as tied. With `tie_word_embeddings` false its code
would not share the embeddings of encoder and decoder either, so such a model is built as tied, gets its head, and says
false afterwards.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig

from sft_recipe.errors import ModelError
from sft_recipe.models.weight_files import weight_files

MODEL_TYPES = ("t5", "mt5")
HEAD = "lm_head.weight"
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
ROWS = 1024  # that are compared at once


def note_untied_head(config: PretrainedConfig, folder: Path) -> None:
    """Set `tie_word_embeddings` to false where the folder's files hold a head that differs from the embeddings."""
    if config.model_type in MODEL_TYPES and _differ(folder):
        config.tie_word_embeddings = False


def has_untied_head(config: PretrainedConfig) -> bool:
    """Return whether the configuration is that of a T5 with an untied head."""
    return config.model_type in MODEL_TYPES and not config.tie_word_embeddings


def as_tied(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of the configuration with which transformers shares the embeddings of encoder and decoder."""
    tied = copy.deepcopy(config)
    tied.tie_word_embeddings = True
    return tied


def separate_head(model: Any) -> None:
    """Untie the head of a T5 that was built as tied."""
    if model.lm_head.weight is model.shared.weight:
        model.lm_head.weight = nn.Parameter(model.shared.weight.detach().clone())
    model.all_tied_weights_keys.pop(HEAD, None)
    model.config.tie_word_embeddings = False


def _differ(folder: Path) -> bool:
    """Compare head and embeddings in the files; not different where one of them is absent."""
    try:
        files = [safe_open(path, "pt") for path in weight_files(folder) if path.is_file()]
    except (ModelError, OSError, SafetensorError):  # reported where weights are needed
        return False
    places = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # not a dictionary
    table = next((name for name in EMBEDDINGS if name in places), None)
    if HEAD not in places or table is None:
        return False
    head, embeddings = places[HEAD].get_slice(HEAD), places[table].get_slice(table)
    if head.get_shape() != embeddings.get_shape():
        return False  # an error that names the shapes follows
    starts = range(0, head.get_shape()[0], ROWS)
    return any(not torch.equal(head[at : at + ROWS], embeddings[at : at + ROWS]) for at in starts)
