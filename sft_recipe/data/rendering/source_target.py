"""Encodes conversations for encoder-decoder models: a source for the encoder, then a target for the decoder.

What is 2 + 2 ? </s> | Four . </s>
0    0  0 0 0 0 0    | 1    1 1        the loss mask is 1 on the target
"""

from collections.abc import Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from sft_recipe.data.messages import Conversation, Message, data_error
from sft_recipe.data.rendering.chat_template import pattern_of
from sft_recipe.data.rendering.escaping import SpecialTokenEscaper
from sft_recipe.data.rendering.options import RenderOptions
from sft_recipe.data.rendering.prompt import Prompt, PromptRenderer
from sft_recipe.data.rendering.renderer import Encoded, Renderer, TooLong
from sft_recipe.data.rendering.text_tokens import TextTokenizer
from sft_recipe.errors import DataError, ModelError
from sft_recipe.models.families import SEQ2SEQ, Family
from sft_recipe.models.tokenizer import special_tokens


class PromptEncoder(Protocol):
    """Encodes messages, with variables of the chat template and tools, up to where a model answers."""

    def __call__(
        self,
        messages: Sequence[dict[str, Any]],
        variables: dict[str, Any] | None = None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> Prompt: ...


class SourceTargetRenderer(Renderer):
    """Encodes the last trained answer of a conversation as the target, and all before it as the source.

    The source is what the tokenizer's chat template makes of the messages, with the generation prompt, or without a
    template their contents, one a line. Both parts have the special tokens that the tokenizer puts around a text, and
    end with the end token. A target does not begin with `decoder_start_id`, which the decoder reads before it anyway.

    Raises ModelError for a tokenizer that is slow or has no end token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        options: RenderOptions = RenderOptions(),  # noqa: B008  # frozen
        decoder_start_id: int | None = None,
    ):
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise ModelError(f"{self.name} has a slow tokenizer; use a fast one (tokenizer.json)")
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{self.name}: the tokenizer has no eos token, which has to end sources and answers")
        if (options.enable_thinking is not None or options.chat_template_kwargs) and not tokenizer.chat_template:
            raise ModelError(
                f"{self.name}: data.enable_thinking and data.chat_template_kwargs need a chat template, and "
                "the tokenizer has none"
            )
        self.tokenizer = tokenizer
        self.options = options
        self.core = tokenizer.backend_tokenizer
        self.tokenize = TextTokenizer(self.core)
        special = special_tokens(tokenizer)
        self.special_pattern = pattern_of(special)
        self.special_ids = {self.core.token_to_id(token) for token in special}
        self.escaper = SpecialTokenEscaper(self.core, self.special_pattern, special)
        self.prompts = PromptRenderer(tokenizer, options) if tokenizer.chat_template else None
        self.before, self.after = _special_ids_around(tokenizer)
        self.before_target = self.before[1:] if self.before[:1] == [decoder_start_id] else self.before

    def encode_within(
        self, conversations: Sequence[Conversation], limit: int | None
    ) -> list[Encoded | DataError | TooLong]:
        """Encode conversations; returns the results in order, a DataError for one that cannot be encoded.

        `limit` is for renderers of one sequence: source and target are compared with their own limits later.
        """
        return [self._attempt_encode(conversation) for conversation in conversations]

    def encode_source(
        self,
        messages: Sequence[dict[str, Any]],
        variables: dict[str, Any] | None = None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> Prompt:
        """Return the source of messages that end before an answer.

        The arguments are those of PromptRenderer.encode. Raises DataError for tools, and where a chat template refuses
        the messages.
        """
        if tools:
            raise DataError("encoder-decoder models are not trained on tools; leave them out", "tools")
        if self.prompts is None:
            ids = self._ids("\n".join(message["content"] for message in messages))
            return Prompt([*self.before, *ids, *self.after], opens_reasoning=False)
        prompt = self.prompts.encode(messages, variables)
        has_end = self.tokenizer.eos_token_id in prompt.ids[-1:]
        return Prompt(prompt.ids if has_end else [*prompt.ids, self.tokenizer.eos_token_id], prompt.opens_reasoning)

    def _attempt_encode(self, conversation: Conversation) -> Encoded | DataError:
        if conversation.tools or any(message.tool_calls for message in conversation.messages):
            problem = "it has tools or tool calls, which encoder-decoder models are not trained on; remove them"
            return data_error(conversation.source, problem, "tools")
        turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
        answer = next((index for index in reversed(turns) if conversation.messages[index].train), turns[-1])
        try:
            source = self.encode_source(conversation.as_dicts()[:answer], conversation.chat_template_kwargs).ids
        except DataError as error:
            return data_error(conversation.source, str(error), error.kind)
        message = conversation.messages[answer]
        target = [*self.before_target, *self._ids(_answer_text(message)), *self.after]
        spells = any(self.special_pattern.search(turn.content) for turn in conversation.messages)
        mask = [0] * len(source) + [int(message.train)] * len(target)
        return Encoded([*source, *target], mask, spells and not self.options.parse_special_tokens)

    def _ids(self, text: str) -> list[int]:
        if self.options.parse_special_tokens or not self.special_pattern.search(text):
            return next(self.tokenize([text])).ids
        return self.escaper.original_ids(next(self.escaper.tokenize([text])).ids)


def prompt_encoder(tokenizer: PreTrainedTokenizerBase, family: Family, options: RenderOptions) -> PromptEncoder:
    """Return what encodes messages, with variables and tools, up to where a model of the family answers.

    Raises ModelError for a tokenizer or chat template that cannot be used.
    """
    if family is SEQ2SEQ:
        return SourceTargetRenderer(tokenizer, options=options).encode_source
    return PromptRenderer(tokenizer, options).encode


def _answer_text(message: Message) -> str:
    return f"<think>\n{message.reasoning}\n</think>\n\n{message.content}" if message.reasoning else message.content


def _special_ids_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text, with the end token among the latter."""
    plain, full = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (False, True))
    begin = next(start for start in range(len(full)) if full[start : start + len(plain)] == plain)
    after = full[begin + len(plain) :]
    return full[:begin], after if tokenizer.eos_token_id in after else [*after, tokenizer.eos_token_id]
