"""Renders conversations with a tokenizer's chat template, and reports what the template inspects in their texts."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from datetime import datetime
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, cast

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from sft_recipe.config.reserved import NOT_TEMPLATE_VARIABLES
from sft_recipe.data.rendering.options import RenderOptions
from sft_recipe.data.turns import REASONING_KEYS, is_empty
from sft_recipe.errors import ModelError
from sft_recipe.models.tokenizer import special_tokens

TAG = re.compile(r"</?\w+>")
# The names that templates use for the variable that switches thinking on.
THINKING_SWITCHES = {"enable_thinking", "thinking"}

Messages = Sequence[dict[str, Any]]
Span = tuple[int, int]  # [start, end) in characters


class TemplateError(Exception):
    """The chat template cannot render a conversation, or what to train on in it cannot be located.

    The message continues the sentence "the chat template of NAME ...". The renderer makes it a DataError.
    """


class Refused(TemplateError):
    """Says that rendering failed: the template raised an error, for the reason `reason`."""

    def __init__(self, error: Exception):
        self.reason = str(error).strip().rstrip(".")
        super().__init__(f"refuses the conversation: {self.reason}")


class ChatTemplate:
    """Renders conversations with the tokenizer's chat template, or with the Jinja source `chat_template`.

    Of the options, those that change the rendering apply. Raises ModelError if there is no template, if it is not valid
    Jinja, or if it has no thinking switch or variable that the options set.

    `special_pattern` finds the tokenizer's special tokens in a text. `sentinel_pattern` finds the strings that the
    template may search for in a text, such as "</think>" and "/no_think".
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        options: RenderOptions = RenderOptions(),  # noqa: B008  # frozen
    ):
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        try:
            self.without_tools = tokenizer.get_chat_template(chat_template)
            self.with_tools = tokenizer.get_chat_template(chat_template, tools=[{}])  # some have a separate template
            is_one = self.without_tools == self.with_tools
            self.source = self.without_tools if is_one else self.without_tools + self.with_tools
            # Without its comments, and each token for itself: a name in a string or in the text is no variable.
            tokens = [(token.type, token.value) for token in jinja2.Environment().lexer.tokenize(self.source)]
        except (ValueError, jinja2.TemplateSyntaxError) as error:
            raise ModelError(f"{self.name}: no usable chat template: {error}") from error
        pairs = list(pairwise([("", ""), *tokens]))
        literals = {value.strip() for kind, value in tokens if kind == "string"}
        self.names = {value for (before, _), (kind, value) in pairs if kind == "name" and before != "dot"}
        fields = {value for (before, _), (kind, value) in pairs if kind == "name" and before == "dot"} | literals
        self.has_generation_tags = any(
            before == "block_begin" and tag == ("name", "generation") for (before, _), tag in pairs
        )
        self.thinking_switches = self.names & THINKING_SWITCHES
        self.variables: dict[str, Any] = {**tokenizer.special_tokens_map, **self._thinking(options.enable_thinking)}
        self.variables |= self._of_run(options.chat_template_kwargs)
        if options.date:
            self.variables["strftime_now"] = datetime.fromisoformat(options.date).strftime
        self.folds_system, self.appends_stop_token = options.fold_system, options.append_stop_token
        named = [key for key in REASONING_KEYS if key in fields]
        self.reasoning_key, self.reads_reasoning = next(iter(named), REASONING_KEYS[0]), bool(named)
        self.wraps_results = "<tool_response>" in self.without_tools  # with tools, no result has the tags any more
        self.needs_json_arguments = False  # some templates need the arguments of calls as JSON text, not as objects
        self.special_tokens = special_tokens(tokenizer)
        self.special_pattern = pattern_of(self.special_tokens)
        # Names such as 'role' are keys of a message rather than strings to search for.
        literals.update(TAG.findall(self.source))
        sentinels = [text for text in literals if len(text) > 2 and not text.isidentifier()]
        self.sentinel_pattern = pattern_of(text for text in sentinels if not self.special_pattern.search(text))

    def _thinking(self, enable: bool | None) -> dict[str, bool]:
        if enable is not None and not self.thinking_switches:
            raise ModelError(
                f"{self.name}: data.enable_thinking is {str(enable).lower()}, but the chat template has no such "
                "switch; leave data.enable_thinking out, or use a template that has it (model.chat_template)."
            )
        return {} if enable is None else dict.fromkeys(self.thinking_switches, enable)

    def _of_run(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        if missing := self._missing(variables):
            raise ModelError(
                f"{self.name}: data.chat_template_kwargs sets {missing}, but the chat template has no such variable"
                f"{self._hint(missing)}; remove it, or use a template that has it (model.chat_template)."
            )
        return variables

    def _missing(self, variables: Mapping[str, Any]) -> str | None:
        """The first variable that the template does not have, unless its value is empty."""
        return next((name for name in variables if name not in self.names and not is_empty(variables[name])), None)

    def _hint(self, missing: str) -> str:
        near = get_close_matches(missing, self.names.difference(NOT_TEMPLATE_VARIABLES), cutoff=0.75)
        return f" (did you mean {' or '.join(near)}?)" if near else ""

    @property
    def can_enable_thinking(self) -> bool:
        """Return whether the template has a thinking switch that is not on."""
        switches = self.thinking_switches
        return bool(switches) and not any(self.variables.get(switch) for switch in switches)

    def with_variables(self, variables: Mapping[str, Any]) -> "ChatTemplate":
        """Return this template with other values for some of its variables.

        Raises TemplateError for a variable that the template does not have, unless its value is empty or switches
        thinking off.
        """
        asked = {name: value for name, value in variables.items() if name not in THINKING_SWITCHES or value}
        if missing := self._missing(asked):
            raise TemplateError(
                f"has no variable {missing} (chat_template_kwargs){self._hint(missing)}; remove it from the data, or "
                "use a template that has it (model.chat_template)"
            )
        template = copy(self)
        known = {name: value for name, value in variables.items() if name in self.names}
        template.variables = {**self.variables, **known}
        return template

    def render(self, messages: Messages, tools: Messages = (), *, prompt: bool = False) -> tuple[str, list[Span]]:
        """Render a conversation.

        Returns the text and the character spans inside the template's {% generation %} tags, [] without tags.
        `prompt` adds the generation prompt, which precedes the assistant's next turn at inference. Raises
        Refused if the template rejects the conversation.
        """
        try:
            return self._render(messages, tools, prompt)
        except Refused:
            if self.needs_json_arguments or not any("tool_calls" in message for message in messages):
                raise
            self.needs_json_arguments = True
            try:
                return self._render(messages, tools, prompt)
            except Refused:
                self.needs_json_arguments = False
            raise

    def accepts_folded_system(self, messages: Messages, tools: Messages = ()) -> bool:
        """Return whether the template renders messages with system turns once these are put into user turns."""
        if self.folds_system or all(message["role"] != "system" for message in messages):
            return False
        try:
            self.render(_with_folded_system(messages), tools)
        except Refused:
            return False
        return True

    def _render(self, messages: Messages, tools: Messages, prompt: bool) -> tuple[str, list[Span]]:
        if self.folds_system:
            messages = _with_folded_system(messages)
        if self.needs_json_arguments:
            messages = [_with_json_arguments(message) for message in messages]
        try:
            rendered = render_jinja_template(
                [list(messages)],
                tools=list(tools) or None,
                chat_template=self.with_tools if tools else self.without_tools,
                return_assistant_tokens_mask=self.has_generation_tags,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"{self.name}: no usable chat template: {error}") from error
        except Exception as error:  # a template is a program: any error that it raises is about these messages
            raise Refused(error) from error
        [text], spans = cast("tuple[list[str], list[list[Span]]]", rendered)  # transformers' annotation says str
        return text, [(start, end) for start, end in spans[0] if start < end] if spans else []


def _with_folded_system(messages: Messages) -> list[dict[str, Any]]:
    """The messages with the text of each system turn at the start of the user turn that follows it.

    [system: Be kind.] [user: Hi]   ->   [user: Be kind.\n\nHi]
    """
    folded: list[dict[str, Any]] = []
    system = ""
    for message in messages:
        if message["role"] == "system":
            system = "\n\n".join(text for text in (system, message["content"]) if text.strip())
            continue
        if system and message["role"] != "user":
            raise Refused(ValueError("data.fold_system needs a user turn after each system turn"))
        folded.append({**message, "content": f"{system}\n\n{message['content']}"} if system else message)
        system = ""
    return folded


def _with_json_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
    calls = [
        {**call, "function": {**function, "arguments": text}}
        for call, function, text in zip(message["tool_calls"], functions, texts, strict=True)
    ]
    return {**message, "tool_calls": calls}


def pattern_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern, one group, that matches any of the strings, longest first; without strings it never matches."""
    longest_first = map(re.escape, sorted(strings, reverse=True))
    return re.compile(f"({'|'.join(longest_first) or '(?!)'})")
