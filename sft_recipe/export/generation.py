"""The generation config of an exported model: that of its base, with the tokens that end a turn added."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from sft_recipe.data.messages import Conversation, Message
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.errors import ModelError, RecipeError, first_line


def generation_settings(model: Path, config: PretrainedConfig, stop_token_ids: Iterable[int]) -> dict[str, Any]:
    """Return the content of generation_config.json for a model that was trained from the one in the folder `model`.

    It is a copy of that model's, or made from `config`, with `stop_token_ids` added to its end tokens: transformers
    refuses to save some that it loads, such as a temperature without do_sample. Raises ModelError.
    """
    settings = read_generation_config(model)
    if settings is None:
        settings = json.loads(GenerationConfig.from_model_config(config).to_json_string())
    ends = end_token_ids(settings)
    ends = [*ends, *(token for token in stop_token_ids if token not in ends)]
    return settings | {"eos_token_id": ends[0] if len(ends) == 1 else ends}


def end_token_ids(settings: dict[str, Any]) -> list[int]:
    """Return the tokens that end a text, by the content of a generation_config.json."""
    known = settings.get("eos_token_id")
    return known if isinstance(known, list) else [known] if known is not None else []


def turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that ends an assistant turn in the tokenizer's chat template, or nothing where none does."""
    conversation = Conversation((Message("user", "Hello."), Message("assistant", "Hello.")))
    try:
        encoded = Renderer(tokenizer).encode(conversation)
    except RecipeError:  # no template, or one that training refuses
        return []
    last = [token for token, is_supervised in zip(encoded.input_ids, encoded.loss_mask, strict=True) if is_supervised][
        -1
    ]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [last] if last in special | {tokenizer.eos_token_id} else []


def read_generation_config(model: Path, say: Callable[[str], None] = lambda text: None) -> dict[str, Any] | None:
    """Return the content of a model folder's generation_config.json, or None where there is none.

    One that is not JSON, which transformers ignores, is as none; `say` gets a message. Raises ModelError for one that
    transformers refuses to load.
    """
    path = model / GENERATION_CONFIG_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        say(f"{path} is not JSON ({error}). The exported model gets one that is made from config.json.")
        return None
    except (OSError, RecursionError) as error:
        raise _unusable(path, error) from None
    try:
        GenerationConfig.from_pretrained(model)
    except Exception as error:  # of many types, depending on the value
        raise _unusable(path, error) from None
    return content


def _unusable(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} cannot be used: {first_line(error).rstrip('.')}. Correct it, or remove it.")
