"""Message and Conversation: the one validated shape that every data format is turned into."""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

from sft_recipe.errors import DataError

ROLES = ("system", "user", "assistant")
KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
KINDS |= {str: "text", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Message:
    """One turn; the content is kept exactly as given."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A conversation that can be trained on. `source` says where it came from (`a.json, record 12`).

    `fields` names the field of the record that each turn's content stood in, for error messages: `prompt`,
    `conversations[3].content`. Two conversations are equal when their messages are.

    Raises DataError for an unknown role, content that is no text, an empty prompt or response, a system turn
    that is not the first, or no assistant turn.
    """

    messages: tuple[Message, ...]
    source: str = field(default="", compare=False)
    fields: InitVar[Sequence[str]] = ()

    def __post_init__(self, fields: Sequence[str]) -> None:
        fields = fields or [f"messages[{index}].content" for index in range(len(self.messages))]
        roles = [message.role for message in self.messages]
        for index, (message, name) in enumerate(zip(self.messages, fields, strict=True)):
            _check_role(roles, index, name.removesuffix("content") + "role", self.source)
            _check_content(message, name, self.source)
        if "assistant" not in roles:
            name = fields[-1].partition("[")[0] if fields else "messages"
            raise located(self.source, f"{name} has no assistant turn, so there is nothing to learn; add one")

    def as_dicts(self) -> list[dict[str, str]]:
        """The turns as chat templates want them."""
        return [{"role": message.role, "content": message.content} for message in self.messages]


def located(source: str, problem: str) -> DataError:
    """A DataError (to raise) that begins with the place, where it is known."""
    return DataError(f"{source}: {problem}." if source else f"{problem}.")


def kind(value: object) -> str:
    """What a value of a record is, in a user's words."""
    return KINDS.get(type(value), type(value).__name__)


def check_text(value: object, name: str, source: str) -> str:
    """The value itself if it is text that can be tokenised; raises DataError if not."""
    if not isinstance(value, str):
        raise located(source, f"{name} is {kind(value)}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character: "\ud83d"
        half = f"\\u{ord(value[error.start]):04x}"
        raise located(source, f"{name} holds {half}, half of a character; write the whole one") from error
    return value


def _check_role(roles: Sequence[str], index: int, name: str, source: str) -> None:
    role = roles[index]
    if role not in ROLES:
        found = repr(role) if isinstance(role, str) else kind(role)
        raise located(source, f"{name} is {found}; expected {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    if role == "system" and "system" in roles[:index]:
        raise located(source, f"{name} makes a second system turn; keep one, as the first turn")
    if role == "system" and index > 0:
        raise located(source, f"{name} is a system turn after other turns; move it to the front")


def _check_content(message: Message, name: str, source: str) -> None:
    content = check_text(message.content, name, source)
    if message.role != "system" and not content.strip():
        what = "response" if message.role == "assistant" else "prompt"
        raise located(source, f"{name} is an empty {what}; fill it in or remove the record")
