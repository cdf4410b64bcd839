"""Conversations of every shape, in which each text consists of words that occur nowhere else."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from sft_recipe.data.messages import Conversation, Message

# Each word is a method of Builder, below.
SHAPES = {
    "one turn": "user assistant",
    "two turns": "user assistant user assistant",
    "eight turns": "system" + 8 * " user assistant",
    "system": "system user assistant user assistant",
    "empty system": "empty_system user assistant",
    "tools": "tools system user assistant",
    "tool call": "tools user call result assistant",
    "parallel calls": "tools user two_calls result assistant",
    "tool call, named in its id": "tools user named_call result assistant",
    "tool result last": "tools user call result",
    "reasoning": "user reasoner user reasoner",
    "inline reasoning": "user inline_reasoner user inline_reasoner",
    "assistant twice": "user assistant assistant",
    "greeting": "assistant user assistant",
    "system, greeting": "system assistant user assistant",
    "turn without loss": "user assistant_without_loss user assistant",
    "special text": "special_user special_assistant",
}
NAMES = ["get_weather", "get_time"]


def build(shape: str, special: str) -> "Builder":
    """Return the builder of a conversation of this shape; `special` is the special token that some texts spell."""
    builder = Builder(special)
    for step in SHAPES[shape].split():
        getattr(builder, step)()
    return builder


class Builder:
    """Builds a conversation turn by turn, and remembers to which message each word belongs."""

    def __init__(self, special: str) -> None:
        self.special = special
        self.messages: list[Message] = []
        self.offered: tuple[dict[str, Any], ...] = ()
        self.called: list[dict[str, Any]] = []
        self.message_of: dict[str, int | None] = {}  # None: a word of the tools
        self.reasoning: set[str] = set()
        self._fresh: Iterator[str] = ("zq" + "".join(letters) for letters in product("bdfgkm", "aeiou", "vwxz"))

    def conversation(self) -> Conversation:
        """Return the conversation."""
        return Conversation(tuple(self.messages), "conversation", self.offered)

    def words(self, message: int | None) -> str:
        """Return three new words."""
        words = [next(self._fresh) for _ in range(3)]
        self.message_of.update(dict.fromkeys(words, message))
        return " ".join(words)

    def system(self) -> None:  # noqa: D102
        self._say("system")

    def empty_system(self) -> None:  # noqa: D102
        self.messages.append(Message("system", ""))

    def user(self) -> None:  # noqa: D102
        self._say("user")

    def special_user(self) -> None:  # noqa: D102
        self._say("user", special=True)

    def assistant(self) -> None:  # noqa: D102
        self._say("assistant")

    def special_assistant(self) -> None:  # noqa: D102
        self._say("assistant", special=True)

    def assistant_without_loss(self) -> None:  # noqa: D102
        self.messages.append(Message("assistant", self._words(), train=False))

    def reasoner(self) -> None:  # noqa: D102
        thought = self._reasoning()
        self.messages.append(Message("assistant", self._words(), thought))

    def inline_reasoner(self) -> None:  # noqa: D102
        content = f"<think>\n{self._reasoning()}\n</think>\n\n{self._words()}"
        self.messages.append(Message("assistant", content))

    def tools(self) -> None:  # noqa: D102
        self.offered = tuple(self._tool(name) for name in NAMES)

    def call(self) -> None:  # noqa: D102
        self._call(NAMES[:1])

    def named_call(self) -> None:  # noqa: D102
        self._call(NAMES[:1], "functions.{name}:0")

    def two_calls(self) -> None:  # noqa: D102
        self._call(NAMES)

    def result(self) -> None:  # noqa: D102
        for call in self.called:
            name = call["function"]["name"]
            self.messages.append(Message("tool", self._words(), name=name, tool_call_id=call["id"]))

    def _say(self, role: str, special: bool = False) -> None:
        content = self._words()
        if special:
            content = f"你好 é\u0301 {content} {self.special} <|none|> {{{{ x }}}} 🙂 {self._words()}"
        self.messages.append(Message(role, content))

    def _words(self) -> str:
        return self.words(len(self.messages))

    def _reasoning(self) -> str:
        thought = self._words()
        self.reasoning.update(thought.split())
        return thought

    def _call(self, names: list[str], identifier: str = "call{index}{number:04}") -> None:
        self.called = [
            {
                "id": identifier.format(name=name, index=len(self.messages), number=number),
                "type": "function",
                "function": {"name": name, "arguments": {"city": self._words(), "days": 3}},
            }
            for number, name in enumerate(names)
        ]
        self.messages.append(Message("assistant", "", tool_calls=tuple(self.called)))

    def _tool(self, name: str) -> dict[str, Any]:
        city = {"type": "string", "description": self.words(None)}
        parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
        function = {"name": name, "description": self.words(None), "parameters": parameters}
        return {"type": "function", "function": function}
