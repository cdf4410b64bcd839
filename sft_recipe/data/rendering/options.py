"""The options that decide which tokens of a conversation are trained on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class RenderOptions:
    """Holds the rendering options of the configuration; see conf/data/default.yaml.

    `train_on`: all assistant turns, or the last one alone. `train_on_reasoning`: False masks reasoning out.
    `enable_thinking`: sets the template's thinking switch; None leaves the template's default.
    `chat_template_kwargs`: variables of the chat template, which those of a conversation override. `fold_system`: puts
    the text of a system turn at the start of the user turn that follows, for templates without system turns.
    `append_stop_token`: ends a conversation with the marker of the next role where the template ends turns with it.
    `thinking_mix`: the fraction of the conversations with reasoning that keep it; None keeps all as they are.
    `random_system_prompt`: the fraction of the conversations without a system turn that get one. `drop_empty_thoughts`:
    the fraction of the conversations that are trained without the empty thoughts of the template. `seed` chooses them.
    `parse_special_tokens`: True encodes data that spells a special token as that token. `date`: the day, "2026-11-29",
    that a template writes which asks for the time (`strftime_now`); None is now.
    """

    train_on: Literal["all", "last"] = "all"
    train_on_reasoning: bool = True
    enable_thinking: bool | None = None
    parse_special_tokens: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    fold_system: bool = False
    append_stop_token: bool = True
    thinking_mix: float | None = None
    random_system_prompt: float = 0.0
    drop_empty_thoughts: float = 0.0
    seed: int = 0
    date: str | None = None
