"""Encodes conversations as token ids and a loss mask."""

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from sft_recipe.data.messages import Conversation, data_error
from sft_recipe.data.rendering.annotate import AnnotatedText, Annotator
from sft_recipe.data.rendering.chat_template import ChatTemplate, TemplateError
from sft_recipe.data.rendering.draws import draw, with_system_prompt, without_empty_thoughts
from sft_recipe.data.rendering.escaping import ESCAPE, SpecialTokenEscaper
from sft_recipe.data.rendering.options import RenderOptions
from sft_recipe.data.rendering.text_tokens import TextTokenizer, Tokens
from sft_recipe.data.rendering.thinking_mix import mix_thinking
from sft_recipe.data.tool_forms import without_result_tags
from sft_recipe.errors import DataError, ModelError

# Characters that tokenizers add or cannot decode: sentencepiece's space, the replacement character, the escape.
NOT_IN_TEXT = dict.fromkeys([0x2581, 0xFFFD, ord(ESCAPE)])
MAX_ANNOTATORS = 64

T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """Holds the token ids of a conversation and, for each token, 1 if it is supervised and 0 if it is context.

    <|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> assistant \\n Yes <|im_end|> \\n
         0        0   0  0      0      0       0           0     0   1      1      0

    `has_special_text`: the data spells a special token, which was encoded as ordinary text. `drops_reasoning`: the
    template leaves out reasoning in the last assistant turn. `earlier_without_reasoning`: the number of earlier
    supervised assistant turns whose reasoning it leaves out. `omits_names`: it leaves out the names of turns.
    `joined_starts`: the number of supervised turns whose first visible text is in a token with the end of the prompt,
    " Paris" after "ASSISTANT: ", so that this token has no loss.
    """

    input_ids: list[int]
    loss_mask: list[int]
    has_special_text: bool = False
    drops_reasoning: bool = False
    earlier_without_reasoning: int = 0
    omits_names: bool = False
    joined_starts: int = 0

    @property
    def source_length(self) -> int:
        """Return the number of tokens before the first supervised one: those of an encoder-decoder's source."""
        return self.loss_mask.index(1) if 1 in self.loss_mask else len(self.loss_mask)


@dataclass(frozen=True)
class TooLong:
    """Says that a conversation has at least `least_tokens` tokens, which is too long; it has not been tokenized."""

    least_tokens: int


class Renderer:
    """Encodes conversations with the tokenizer's chat template, or with the Jinja source `chat_template`.

    Raises ModelError for a tokenizer without character offsets, for a template that cannot be used (see ChatTemplate)
    and, on encoding, for a template that ends the assistant's turns without a special token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        options: RenderOptions = RenderOptions(),  # noqa: B008  # frozen
    ):
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise ModelError(
                f"{self.name}: the slow tokenizer {type(tokenizer).__name__} has no character offsets, so no loss mask "
                "can be computed; use a fast tokenizer (tokenizer.json)."
            )
        self.tokenizer = tokenizer
        self.options = options
        self.template = ChatTemplate(tokenizer, chat_template, options)
        if self._spells_special_token(json.dumps(dict(options.chat_template_kwargs), ensure_ascii=False)):
            raise ModelError(
                "data.chat_template_kwargs spells a special token, which cannot be kept as text; remove it, or set "
                "data.parse_special_tokens=true."
            )
        self.core = tokenizer.backend_tokenizer
        self.tokenize = TextTokenizer(self.core)
        self.escaper = SpecialTokenEscaper(self.core, self.template.special_pattern, self.template.special_tokens)
        self.annotators: dict[str, Annotator] = {}  # by the variables that a record gives to the template
        self.special_ids = {self.core.token_to_id(token) for token in self.template.special_tokens}

    @cached_property
    def vocabulary_size(self) -> int:
        """Return the number that all token ids are below."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, conversation: Conversation) -> Encoded:
        """Encode one conversation.

        Raises DataError, with the conversation's source, if the template rejects the conversation or leaves out a
        part of it, or if the tokens to train on cannot be located with certainty.
        """
        encoded = self.encode_batch([conversation])[0]
        if isinstance(encoded, DataError):
            raise encoded
        return encoded

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded | DataError]:
        """Encode conversations; returns the results in order, a DataError for a conversation that cannot be encoded.

        conversation -> text with the spans to train on -> tokens -> ids and mask
        """
        encoded = self.encode_within(conversations, None)
        return [item for item in encoded if not isinstance(item, TooLong)]  # no item is one

    def encode_within(
        self, conversations: Sequence[Conversation], limit: int | None
    ) -> list[Encoded | DataError | TooLong]:
        """Do as `encode_batch`, but give TooLong for a text that surely has more tokens than `limit`.

        Its length says so, or the number of answers, which end with a token each. Tokenizing such a text would take
        more than a hundred times its memory, and locating thousands of turns minutes.
        """
        annotated = [
            self._attempt(conversation, self._annotate_within, conversation, limit) for conversation in conversations
        ]
        tokens = iter(self._tokenize([item for item in annotated if isinstance(item, AnnotatedText)]))
        return [
            self._attempt(conversation, self._mask, item, next(tokens)) if isinstance(item, AnnotatedText) else item
            for conversation, item in zip(conversations, annotated, strict=True)
        ]

    def _annotate_within(self, conversation: Conversation, limit: int | None) -> AnnotatedText | TooLong:
        answers = sum(message.role == "assistant" for message in conversation.messages)
        if limit is not None and answers > limit:
            return TooLong(answers)
        annotated = self._annotate(conversation)
        if limit is None or len(annotated.text) <= 4 * limit:  # spares the search for the longest token
            return annotated
        least = self.tokenize.least_tokens(annotated.text, added_bytes=len(ESCAPE.encode()))
        return TooLong(least) if least > limit else annotated

    def _annotate(self, conversation: Conversation) -> AnnotatedText:
        options, given = self.options, conversation
        if options.random_system_prompt:
            conversation = with_system_prompt(conversation, options.random_system_prompt, options.seed)
        if (share := options.thinking_mix) is not None:
            conversation = mix_thinking(conversation, share, options.seed, self.template.thinking_switches)
        if self.template.wraps_results:
            conversation = without_result_tags(conversation)
        variables = conversation.chat_template_kwargs
        key = json.dumps(variables, ensure_ascii=False, sort_keys=True)
        if key not in self.annotators:
            if self._spells_special_token(key):
                raise TemplateError(
                    "gets a variable that spells a special token (chat_template_kwargs), which cannot be kept as text; "
                    "remove it from the data, or set data.parse_special_tokens=true"
                )
            template = self.template.with_variables(variables)
            if len(self.annotators) >= MAX_ANNOTATORS:
                self.annotators.clear()
            self.annotators[key] = Annotator(template, self.options, self.core, self.escaper)
        annotated = self.annotators[key].annotate(conversation)
        dropped = options.drop_empty_thoughts
        if dropped and draw(given, options.seed, "empty thought") < dropped:
            return without_empty_thoughts(annotated)
        return annotated

    def _spells_special_token(self, text: str) -> bool:
        return not self.options.parse_special_tokens and self.template.special_pattern.search(text) is not None

    def _attempt(self, conversation: Conversation, step: Callable[..., T], *args: Any) -> T | DataError:
        """The result of a step, or the DataError that names the conversation's source and the template."""
        try:
            return step(*args)
        except TemplateError as problem:
            error = data_error(conversation.source, f"the chat template of {self.name} {problem}", "template")
            error.__cause__ = problem
            return error

    def _tokenize(self, texts: Sequence[AnnotatedText]) -> list[Tokens]:
        """The tokens of each text, tokenized as one batch with each of the two tokenizers."""
        plain = iter(self.tokenize([item.text for item in texts if not item.is_escaped]))
        if not any(item.is_escaped for item in texts):
            return list(plain)  # without building the second tokenizer
        escaped = iter(self.escaper.tokenize([item.text for item in texts if item.is_escaped]))
        return [next(escaped if item.is_escaped else plain) for item in texts]

    def _mask(self, annotated: AnnotatedText, tokens: Tokens) -> Encoded:
        """Set the mask to 1 on the tokens of each span; raises TemplateError if these do not decode to its text."""
        ids = tokens.ids
        if annotated.is_escaped:
            ids = self.escaper.original_ids(ids)
            if [token_id for token_id in ids if token_id in self.special_ids] != annotated.special_ids:
                raise TemplateError(
                    "gets data that spells a special token, which this tokenizer cannot encode as ordinary text; "
                    "remove it from the data, or set data.parse_special_tokens=true"
                )
        mask, joined_starts = [0] * len(ids), 0
        for start, end in annotated.spans:
            if self.template.has_generation_tags:  # as in transformers: every token that overlaps the tagged text
                first, last = tokens.token_at(start), tokens.token_at(end - 1) + 1
            else:
                first, last = tokens.first_token_from(start), tokens.first_token_from(end)
                is_open = first < last and not self.options.append_stop_token
                if not is_open and (first == last or ids[last - 1] not in self.special_ids):
                    ending = annotated.text[:end][-20:]
                    raise TemplateError(f"ends a turn with {ending!r}, which is not encoded as one special token")
                self._check_decoded(ids[first:last], tokens.source_text(first, last))
                joined_starts += bool(tokens.text_before(first, start).strip())
            mask[first:last] = [1] * (last - first)
        mask[0] = 0
        omitted = annotated.drops_reasoning, annotated.earlier_without_reasoning, annotated.omits_names
        return Encoded(ids, mask, annotated.is_escaped, *omitted, joined_starts)

    def _check_decoded(self, ids: list[int], text: str | None) -> None:
        """Raise TemplateError if ids do not decode to their text; None stands for a text that they surely decode to."""
        if text is None or self.tokenizer.unk_token_id in ids:
            return
        decoded = self.core.decode(ids, skip_special_tokens=False)
        if decoded != text and _normalized(decoded, self.core.normalizer) != _normalized(text, self.core.normalizer):
            raise TemplateError(f"renders {text[:80]!r}, but the tokens decode to {decoded[:80]!r}")


def _normalized(text: str, normalizer: Any) -> str:
    """A text without what encoding and decoding may change: white space and equivalent Unicode spellings."""
    text = unicodedata.normalize("NFKC", normalizer.normalize_str(text) if normalizer else text)
    return "".join(text.translate(NOT_IN_TEXT).split())
