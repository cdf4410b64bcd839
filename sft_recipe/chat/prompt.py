"""Renders a conversation, up to where the model answers, as token ids: as in training."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from sft_recipe.data.messages import check_text
from sft_recipe.data.rendering.chat_template import ChatTemplate, TemplateError
from sft_recipe.data.rendering.escaping import SpecialTokenEscaper
from sft_recipe.data.rendering.skeleton import SLOT, split_at_slots
from sft_recipe.data.rendering.text_tokens import TextTokenizer
from sft_recipe.errors import DataError, ModelError

OPENED_THINKING = re.compile(r"<think>\s*$")
RESERVED = re.compile("[\ufdd0-\ufdd2]")  # the characters of slots and of the escape


@dataclass(frozen=True)
class Prompt:
    """Holds the token ids of a prompt; with `opens_reasoning` it ends with `<think>`, so that reasoning follows."""

    ids: list[int]
    opens_reasoning: bool


class PromptRenderer:
    """Renders prompts with the tokenizer's chat template; what a message spells stays text, as in training.

    Raises ModelError for a slow tokenizer, and for a chat template that is missing or cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, enable_thinking: bool | None = None):
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise ModelError(f"{self.name} has a slow tokenizer; use a fast one (tokenizer.json)")
        self.template = ChatTemplate(tokenizer, None, enable_thinking)
        core = tokenizer.backend_tokenizer
        self.tokenize = TextTokenizer(core)
        self.escaper = SpecialTokenEscaper(core, self.template.special_pattern, self.template.special_tokens)

    def encode(self, messages: Sequence[dict[str, str]], variables: dict[str, Any] | None = None) -> Prompt:
        """Return the prompt of a conversation: its messages, then the header of the assistant's turn.

        `messages` are as chat templates expect them, with reasoning as `reasoning_content`; `variables` are further
        variables of the template. Raises DataError where the template refuses them.
        """
        spelled: list[str] = []  # special tokens in messages, which become slots
        turns = [self._with_slots(self._with_reasoning_key(message), spelled) for message in messages]
        try:
            template = self.template.with_variables(variables) if variables else self.template
            text, _ = template.render(turns, prompt=True)
        except TemplateError as error:
            raise DataError(f"the chat template of {self.name} {error}", "template") from None
        opens_reasoning = OPENED_THINKING.search(text) is not None
        if not spelled:
            return Prompt(next(self.tokenize([text])).ids, opens_reasoning)
        literals, slots = split_at_slots(text)
        texts = [self.escaper.escape(literals[0])]
        for slot, literal in zip(slots, literals[1:], strict=True):
            texts += spelled[int(slot)], self.escaper.escape(literal)
        ids = next(self.escaper.tokenize(["".join(texts)])).ids
        return Prompt(self.escaper.original_ids(ids), opens_reasoning)

    def _with_reasoning_key(self, message: dict[str, str]) -> dict[str, str]:
        reasoning = message.get("reasoning_content")
        if reasoning is None or self.template.reasoning_key == "reasoning_content":
            return message
        others = {key: value for key, value in message.items() if key != "reasoning_content"}
        return others | {self.template.reasoning_key: reasoning}

    def _with_slots(self, message: dict[str, str], spelled: list[str]) -> dict[str, str]:
        """Return the message with a slot in place of each special token that its texts spell."""

        def slot(match: re.Match[str]) -> str:
            spelled.append(match[0])
            return SLOT.format(len(spelled) - 1)

        if any(RESERVED.search(check_text(text, key, "")) for key, text in message.items()):
            raise DataError("a message contains one of the Unicode noncharacters U+FDD0 to U+FDD2; remove it")
        pattern = self.template.special_pattern
        return {key: pattern.sub(slot, text) if key != "role" else text for key, text in message.items()}
