"""Answers lists of prompts, each prompt in a new conversation."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from sft_recipe.chat.display import Display, asking
from sft_recipe.chat.model import Reply
from sft_recipe.chat.session import Session


def answer_prompts(
    prompts: Sequence[str], sessions: Sequence[Session], display: Display, has_headings: bool = True
) -> None:
    """Show the answers to each prompt, below the prompt unless `has_headings` is False.

    Every prompt begins a new conversation. Raises KeyboardInterrupt on Ctrl-C.
    """
    for number, prompt in enumerate(prompts, start=1):
        if has_headings:
            display.heading(f"[{number}/{len(prompts)}] {prompt}")
        replies = display.answer(_fresh(sessions), asking(prompt))
        if any(reply.finish_reason == "canceled" for reply in replies):
            raise KeyboardInterrupt


def answer_prompts_as_json(prompts: Sequence[str], sessions: Sequence[Session], write: Callable[[str], Any]) -> None:
    """Write one JSON object per prompt, with the answers of all sessions; every prompt begins a new conversation."""
    for prompt in prompts:
        answers = [{"model": session.model.name} | _record(session.ask(prompt)) for session in _fresh(sessions)]
        write(json.dumps({"prompt": prompt, "answers": answers}, ensure_ascii=False) + "\n")


def _fresh(sessions: Sequence[Session]) -> list[Session]:
    """Sessions of the same models and options, with the same system prompt."""
    return [Session(session.model, session.sampling, session.messages) for session in sessions]


def _record(reply: Reply) -> dict[str, Any]:
    return {
        "answer": reply.content,
        "reasoning": reply.reasoning,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
    }
