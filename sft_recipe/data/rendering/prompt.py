"""Renders a conversation, up to where the model answers, as token ids: as in training."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from sft_recipe.data.messages import check_text
from sft_recipe.data.rendering.chat_template import ChatTemplate, TemplateError
from sft_recipe.data.rendering.escaping import SpecialTokenEscaper
from sft_recipe.data.rendering.options import RenderOptions
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

    With `parse_special_tokens` special tokens that a message spells become these tokens.

    Raises ModelError for a slow tokenizer, and for a chat template that is missing or cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: RenderOptions = RenderOptions(),  # noqa: B008  # frozen
    ):
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise ModelError(f"{self.name} has a slow tokenizer; use a fast one (tokenizer.json)")
        self.template = ChatTemplate(tokenizer, None, options)
        self.parse_special_tokens = options.parse_special_tokens
        core = tokenizer.backend_tokenizer
        self.tokenize = TextTokenizer(core)
        self.escaper = SpecialTokenEscaper(core, self.template.special_pattern, self.template.special_tokens)

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        variables: dict[str, Any] | None = None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> Prompt:
        """Return the prompt of a conversation: its messages, then the header of the assistant's turn.

        `messages` are as chat templates expect them, with reasoning as `reasoning_content`; `variables` are further
        variables of the template, `tools` the schemas of functions. Raises DataError where the template refuses them,
        or does not show the tools.
        """
        spelled: list[str] = []  # special tokens in messages and tools, which become slots
        turns = [self._with_slots(self._with_reasoning_key(message), spelled) for message in messages]
        schemas = [self._with_slots(tool, spelled) for tool in tools]
        try:
            template = self.template.with_variables(variables) if variables else self.template
            text, _ = template.render(turns, schemas, prompt=True)
            if schemas and template.render(turns, prompt=True)[0] == text:
                raise DataError(f"the chat template of {self.name} does not show tools to the model", "tools")
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

    def _with_reasoning_key(self, message: dict[str, Any]) -> dict[str, Any]:
        reasoning = message.get("reasoning_content")
        if reasoning is None or self.template.reasoning_key == "reasoning_content":
            return message
        others = {key: value for key, value in message.items() if key != "reasoning_content"}
        return others | {self.template.reasoning_key: reasoning}

    def _with_slots(self, value: Any, spelled: list[str], name: str = "") -> Any:
        """Return a message or tool with a slot in place of each special token that one of its texts spells.

        Keys of a nested object, such as names of arguments, are texts as well.
        """

        def slot(match: re.Match[str]) -> str:
            spelled.append(match[0])
            return SLOT.format(len(spelled) - 1)

        if isinstance(value, dict):
            return {
                self._with_slots(key, spelled, "a key"): self._with_slots(inner, spelled, key)
                for key, inner in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._with_slots(inner, spelled, f"{name}[{index}]") for index, inner in enumerate(value)]
        if not isinstance(value, str):
            return value
        if RESERVED.search(check_text(value, name, "")):
            raise DataError("a message contains one of the Unicode noncharacters U+FDD0 to U+FDD2; remove it")
        return value if self.parse_special_tokens else self.template.special_pattern.sub(slot, value)
