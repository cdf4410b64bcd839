"""An Ollama Modelfile whose template renders conversations as the tokenizer's chat template does, or a refusal.

A chat template that only puts texts between markers becomes a Go template with the same markers:

    {{ range .Messages }}{{ if eq .Role "user" }}{{ "<|im_start|>user\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}...
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from sft_recipe.errors import ModelError

SYSTEM, USER, ASSISTANT = "Xsystemtext", "Xusertext", "Xassistanttext"
Turns = Sequence[tuple[str, str]]
# Conversations that both templates must render equally: texts that a template may strip, replace or escape.
PROBES: tuple[Turns, ...] = (
    (("user", "Hello."),),
    (("system", "Be brief."), ("user", "Hello.")),
    (("user", "1"), ("assistant", "2"), ("user", "3")),
    (("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")),
    (("user", "  two spaces and a line break \n"), ("assistant", " text\n\n"), ("user", "\tend ")),
    (
        ("system", " \nrules\n"),
        ("user", "你好 {{ .Content }} <b> \"quoted\" 'x' \\n"),
        ("assistant", "é"),
        ("user", "?"),
    ),
)


@dataclass(frozen=True)
class Markers:
    """Markers are what a chat template puts around texts; `opening` comes first where there is no system turn."""

    opening: str
    before: dict[str, str]
    after: dict[str, str]
    generation: str


def modelfile(gguf_file: str, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> str:
    """Return the content of a Modelfile for a GGUF file beside it, with the texts `stops` that end an answer.

    Raises ModelError where the chat template does something that Ollama's templates cannot do.
    """
    template = go_template(_find_markers(tokenizer))
    for turns in PROBES:
        expected, found = _render(tokenizer, turns, True), render_go(template, turns)
        if expected != found:
            raise ModelError(
                f"no Modelfile: the chat template does more than put texts between markers. It renders {list(turns)} "
                f"as {expected!r}, and the template for Ollama would render {found!r}"
            )
    lines = [f"FROM ./{gguf_file}", f'TEMPLATE """{template}"""']
    return "\n".join([*lines, *(f"PARAMETER stop {_quoted(stop)}" for stop in stops)]) + "\n"


def go_template(markers: Markers) -> str:
    """Return the Go template with these markers, as Ollama reads it: one line, texts as quoted strings."""
    text = f"{{{{ if not .System }}}}{_literal(markers.opening)}{{{{ end }}}}" if markers.opening else ""
    text += "{{ range .Messages }}"
    for number, role in enumerate(markers.before):
        text += f'{{{{ {"else " if number else ""}if eq .Role "{role}" }}}}'
        text += f"{_literal(markers.before[role])}{{{{ .Content }}}}{_literal(markers.after[role])}"
    return text + "{{ end }}{{ end }}" + _literal(markers.generation)


def render_go(template: str, turns: Turns) -> str:
    """Return what a template of `go_template` renders, followed action by action."""
    actions = re.findall(r'\{\{ ("(?:[^"\\]|\\.)*"|.*?) \}\}', template)
    has_system = any(role == "system" for role, _ in turns)

    def block(at: int, turn: tuple[str, str], holds: bool = True) -> tuple[str, int]:
        """Follow the actions from `at` to the `end` of their block; return the text, and the place after the block.

        In the block of an `if`, `holds` is its condition; of its branches the first that holds is followed.
        """
        text, is_taken = "", False
        while at < len(actions):
            action, at = actions[at], at + 1
            is_followed = holds and not is_taken
            if action == "end":
                break
            if action.startswith("else if"):
                is_taken, holds = is_taken or holds, _holds(action, turn, has_system)
            elif action.startswith(("if", "range")):
                is_loop = action.startswith("range")
                each_turn = turns if is_loop else [turn]
                inner = [block(at, each, is_loop or _holds(action, each, has_system)) for each in each_turn]
                text += "".join(part for part, _ in inner) if is_followed else ""
                at = inner[0][1]
            elif is_followed:
                text += turn[1] if action == ".Content" else str(json.loads(action))
        return text, at

    return block(0, ("", ""))[0]


def _holds(condition: str, turn: tuple[str, str], has_system: bool) -> bool:
    return not has_system if condition.endswith("not .System") else condition.endswith(f'"{turn[0]}"')


def _find_markers(tokenizer: PreTrainedTokenizerBase) -> Markers:
    user, answer, system = ("user", USER), ("assistant", ASSISTANT), ("system", SYSTEM)
    alone = _split(_render(tokenizer, [user], False), USER)
    answered = _split(_render(tokenizer, [user, answer, user], False), USER, ASSISTANT, USER)
    closed = _split(_render(tokenizer, [user, answer], False), USER, ASSISTANT)
    opened = _split(_render(tokenizer, [system, user], False), SYSTEM, USER)
    prompted = _split(_render(tokenizer, [user], True), USER)
    after = {"user": alone[1], "assistant": closed[2]}
    before_user = _without(answered[2], prefix=after["assistant"])
    before = {
        "system": opened[0],
        "user": before_user,
        "assistant": _without(answered[1], prefix=after["user"]),
    }
    after["system"] = _without(opened[1], suffix=before_user)
    opening = _without(alone[0], suffix=before_user)
    return Markers(opening, before, after, _without(prompted[1], prefix=after["user"]))


def _split(text: str, *contents: str) -> list[str]:
    """Return the texts before, between and after the contents. Raises ModelError where one is missing."""
    parts = []
    for content in contents:
        part, found, text = text.partition(content)
        if not found:
            raise ModelError("no Modelfile: the chat template leaves out the text of a turn")
        parts.append(part)
    return [*parts, text]


def _without(text: str, prefix: str = "", suffix: str = "") -> str:
    if not (text.startswith(prefix) and text.endswith(suffix)):
        raise ModelError("no Modelfile: the chat template puts different markers around equal turns")
    return text[len(prefix) : len(text) - len(suffix)]


def _render(tokenizer: PreTrainedTokenizerBase, turns: Turns, prompt: bool) -> str:
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except (ValueError, TypeError, jinja2.TemplateError) as error:
        raise ModelError(f"no Modelfile: the chat template cannot render {list(turns)}: {error}") from None


def _literal(text: str) -> str:
    return f"{{{{ {_quoted(text)} }}}}" if text else ""


def _quoted(text: str) -> str:
    """Return the text as a string literal that JSON and Go share."""
    return json.dumps(text, ensure_ascii=False)
