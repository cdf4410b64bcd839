"""The options that decide which tokens of a conversation are trained on."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RenderOptions:
    """Holds the rendering options of the configuration; see conf/data/default.yaml.

    `train_on`: all assistant turns, or the last one alone. `train_on_reasoning`: False masks reasoning out.
    `enable_thinking`: sets the template's thinking switch; None leaves the template's default.
    `parse_special_tokens`: True encodes data that spells a special token as that token.
    """

    train_on: Literal["all", "last"] = "all"
    train_on_reasoning: bool = True
    enable_thinking: bool | None = None
    parse_special_tokens: bool = False
