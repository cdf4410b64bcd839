"""A conversation with a model: history, system prompt, another answer to the same question."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sft_recipe.chat.model import ChatModel, Reply
from sft_recipe.chat.sampling import Sampling
from sft_recipe.chat.text_stream import Piece
from sft_recipe.data.messages import Conversation, Message
from sft_recipe.errors import DataError


def ignore(piece: Piece) -> None:
    """Do nothing with a piece of an answer."""


class Session:
    """A Session is a conversation with one model; terminal, lists, comparison and server answer through sessions.

    `messages` are as chat templates expect them; a system message is first, if there is one. `tools` are the schemas of
    the functions that the model may call.
    """

    def __init__(
        self,
        model: ChatModel,
        sampling: Sampling,
        messages: Sequence[dict[str, Any]] = (),
        tools: Sequence[dict[str, Any]] = (),
    ):
        self.model, self.sampling, self.tools = model, sampling, tools
        self.messages = list(messages)
        self._answers = 0  # since the last question; each has another seed

    @property
    def system(self) -> str:
        """Return the system prompt, "" if there is none."""
        return str(self.messages[0]["content"]) if self.messages and self.messages[0]["role"] == "system" else ""

    def set_system(self, text: str) -> None:
        """Replace the system prompt, or remove it with ""; the history stays."""
        others = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *others] if text else others

    def reset(self) -> None:
        """Forget the history; the system prompt stays."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def ask(self, text: str, emit: Callable[[Piece], None] = ignore, cancel: threading.Event | None = None) -> Reply:
        """Return the answer to a question; both become part of the history. Raises what `answer` raises."""
        self.messages.append({"role": "user", "content": text})
        self._answers = 0
        try:
            return self.answer(emit, cancel)
        except BaseException:
            self.messages.pop()
            raise

    def retry(self, emit: Callable[[Piece], None] = ignore, cancel: threading.Event | None = None) -> Reply:
        """Return another answer to the last question, in place of the one before.

        Raises DataError where there is no question, and what `answer` raises.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise DataError("there is no answer to replace yet")
        replaced = self.messages.pop()
        try:
            return self.answer(emit, cancel)
        except BaseException:
            self.messages.append(replaced)
            raise

    def answer(
        self,
        emit: Callable[[Piece], None] = ignore,
        cancel: threading.Event | None = None,
        variables: dict[str, Any] | None = None,
    ) -> Reply:
        """Return the model's answer to the messages so far, which becomes the next message.

        `emit` receives its pieces while they are generated; `cancel` ends it early; `variables` are for the chat
        template. Raises DataError where the template refuses messages or tools, or they leave no room in the context,
        and ModelError where the device has too little memory.
        """
        prompt = self.model.encode_prompt(self.messages, variables, self.tools)
        if self.model.room(prompt) == 0:
            raise DataError(
                f"the conversation has {len(prompt.ids)} tokens, and the model's context is "
                f"{self.model.context_length}: shorten it, or start a new one",
                "length",
            )
        sampling = self.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + self._answers)
        reply = self.model.generate(prompt, sampling, emit, cancel)
        self._answers += 1
        reasoning = {"reasoning_content": reply.reasoning} if reply.reasoning else {}
        self.messages.append({"role": "assistant", "content": reply.content, **reasoning})
        return reply

    def record(self) -> dict[str, Any]:
        """Return the conversation as a record that training reads. Raises DataError where it is none."""
        turns = [Message(turn["role"], turn["content"], turn.get("reasoning_content", "")) for turn in self.messages]
        return Conversation(tuple(turns)).as_record()
