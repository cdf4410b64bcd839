"""A tokenizer's chat template: what it renders, and what it looks for in what people say."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from sft_recipe.errors import ModelError
from sft_recipe.models.tokenizer import special_tokens

TAG = re.compile(r"</?\w+>")
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# How templates call an assistant's reasoning, and the switch that turns thinking on.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
THINKING_SWITCH = re.compile(r"(?<![.\w'\"])(enable_thinking|thinking)(?![\w'\"])")

Messages = Sequence[dict[str, Any]]
Span = tuple[int, int]  # [start, end) in characters


class Problem(Exception):
    """What a chat template does, as the end of a sentence; becomes a DataError that names the source."""


class Template:
    """Renders conversations by the tokenizer's chat template, or by the one given.

    Raises ModelError where there is none, where it is no Jinja, and where it has no thinking to switch.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, enable_thinking: bool | None = None
    ):
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        try:
            self.plain = tokenizer.get_chat_template(chat_template)
            self.with_tools = tokenizer.get_chat_template(chat_template, tools=[{}])  # some have one for tools alone
            self.text = self.plain if self.plain == self.with_tools else self.plain + self.with_tools
            lexed = jinja2.Environment().lexer.tokenize(self.text)
            literals = {token.value.strip() for token in lexed if token.type == "string"}
        except (ValueError, jinja2.TemplateSyntaxError) as error:
            raise ModelError(f"{self.name}: no usable chat template: {error}") from error
        self.is_marked = GENERATION.search(self.text) is not None
        self.variables = {**tokenizer.special_tokens_map, **self._thinking(enable_thinking)}
        named = re.findall(rf"(?:\.|\[?['\"])({'|'.join(REASONING_KEYS)})(?!\w)", self.text)
        self.reasoning_key = next((key for key in REASONING_KEYS if key in named), REASONING_KEYS[0])
        self.wants_text = False  # some templates want the arguments of calls as JSON, not as objects
        self.special_tokens = special_tokens(tokenizer)
        self.special = any_of(self.special_tokens)
        # What a template may look for in a text, such as '</think>', '/no_think', not names like 'role'.
        literals.update(TAG.findall(self.text))
        sentinels = [text for text in literals if len(text) > 2 and not text.isidentifier()]
        self.sentinels = any_of(text for text in sentinels if not self.special.search(text))

    def _thinking(self, wanted: bool | None) -> dict[str, bool]:
        switches = THINKING_SWITCH.findall(self.text)
        if wanted is not None and not switches:
            raise ModelError(
                f"{self.name}: data.enable_thinking is {str(wanted).lower()}, but the chat template has no such "
                "switch; leave it out, or give a template that has one (model.chat_template)."
            )
        return {} if wanted is None else dict.fromkeys(switches, wanted)

    def render(self, messages: Messages, tools: Messages = (), *, prompt: bool = False) -> tuple[str, list[Span]]:
        """The conversation as text, and what stands between {% generation %} marks where the template has them.

        `prompt` adds what leads to the assistant's next turn. Raises Problem where the template refuses.
        """
        try:
            return self._render(messages, tools, prompt)
        except Problem:
            if self.wants_text or not any("tool_calls" in message for message in messages):
                raise
            self.wants_text = True
            try:
                return self._render(messages, tools, prompt)
            except Problem:
                self.wants_text = False
            raise

    def _render(self, messages: Messages, tools: Messages, prompt: bool) -> tuple[str, list[Span]]:
        if self.wants_text:
            messages = [_with_text_arguments(message) for message in messages]
        try:
            texts, marks = render_jinja_template(
                [messages],
                tools=list(tools) or None,
                chat_template=self.with_tools if tools else self.plain,
                return_assistant_tokens_mask=self.is_marked,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"{self.name}: no usable chat template: {error}") from error
        except Exception as error:  # a template is a program: whatever it raises is about these messages
            raise Problem(f"refuses the conversation: {str(error).strip().rstrip('.')}") from error
        return texts[0], [(start, end) for start, end in marks[0] if start < end] if marks else []


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
    calls = [
        {**call, "function": {**function, "arguments": text}}
        for call, function, text in zip(message["tool_calls"], functions, texts, strict=True)
    ]
    return {**message, "tool_calls": calls}


def any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the strings, the longest that fits; nothing if there are none."""
    longer_first = map(re.escape, sorted(strings, reverse=True))
    return re.compile(f"({'|'.join(longer_first) or '(?!)'})")
