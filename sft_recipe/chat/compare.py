"""Loads the models of a conversation: one, or two to compare; a LoRA adapter and its base share their weights."""

from dataclasses import replace

import torch

from sft_recipe.chat.model import ChatModel
from sft_recipe.chat.source import ModelSource, find_source
from sft_recipe.errors import ConfigError


def load_models(
    name: str,
    base: str | None,
    device: torch.device,
    enable_thinking: bool | None = None,
    trust_remote_code: bool = False,
) -> list[ChatModel]:
    """Return the model that `name` means, after the model `base` if one is given; "" is the one it was trained from.

    A LoRA adapter and its base share their weights: the adapter is off while the base answers. `enable_thinking` is for
    both; by default each has that of its training. Raises ConfigError where nothing says what the model was trained
    from, and ModelError.
    """

    def find(name: str) -> ModelSource:
        source = find_source(name, trust_remote_code)
        if enable_thinking is None:
            return source
        others = {key: value for key, value in source.options.chat_template_kwargs.items() if key != "enable_thinking"}
        options = replace(source.options, enable_thinking=enable_thinking, chat_template_kwargs=others)
        return replace(source, options=options)

    source = find(name)
    if base is None:
        return [ChatModel(source, device, trust_remote_code)]
    shown, base = base or source.base_name, base or source.trained_from
    if not base or not shown:
        raise ConfigError(f"nothing says what {name} was trained from; name that model: --compare BASE")
    other = replace(find(base), name=shown)
    if source.adapter and other.adapter is None and other.model.folder.samefile(source.model.folder):
        model = ChatModel(source, device, trust_remote_code)
        return [model.without_adapter(shown), model]
    return [ChatModel(found, device, trust_remote_code) for found in (other, source)]
