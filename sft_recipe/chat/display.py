"""Shows answers on a terminal or through a pipe: streamed, or those of two models side by side."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_recipe.chat.model import Reply
from sft_recipe.chat.session import Session
from sft_recipe.chat.text_stream import Piece
from sft_recipe.language import plural

REASONING_STYLE = "dim"
# Control characters except tab and newline, and those that reorder text: an answer must not move the cursor, recolor
# the terminal, or look like another text.
CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)])

Emit = Callable[[Piece], None]
Respond = Callable[[Session, Emit, threading.Event], Reply]


def asking(text: str) -> Respond:
    """Return what lets a session answer a question."""
    return lambda session, emit, cancel: session.ask(text, emit, cancel)


class Display:
    """Shows what sessions answer. Reasoning is dimmed on a terminal, and left out of what goes through a pipe."""

    def __init__(self, console: Console):
        self.console = console

    def answer(self, sessions: Sequence[Session], respond: Respond) -> list[Reply]:
        """Let each session respond, and show the answers; returns them in order.

        `respond` gets a session, a function that receives the pieces of its answer, and an event that ends it, which
        the first Ctrl-C sets. Raises what `respond` raises.
        """
        with _cancel_on_interrupt() as cancel:
            if len(sessions) == 1:
                return [self._stream(sessions[0], respond, cancel)]
            return self._side_by_side(sessions, respond, cancel)

    def notice(self, text: str) -> None:
        """Show one line that belongs to no answer; on stderr, if answers go through a pipe."""
        if self.console.is_terminal:
            self.console.print(Text(text, style=REASONING_STYLE), soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def heading(self, text: str) -> None:
        """Show the prompt that the next answer is for."""
        self.console.print(Text(f"\n{text.translate(CONTROL)}", style="bold"), soft_wrap=True)

    def _stream(self, session: Session, respond: Respond, cancel: threading.Event) -> Reply:
        kinds: list[str] = []

        def emit(piece: Piece) -> None:
            if piece.kind == "answer" and kinds[-1:] == ["reasoning"] and self.console.is_terminal:
                self._print("\n\n")
            kinds.append(piece.kind)
            if piece.kind == "answer":
                self._print(piece.text)
            elif self.console.is_terminal:
                self._print(piece.text, REASONING_STYLE)

        try:
            reply = respond(session, emit, cancel)
        finally:
            if kinds:
                self._print("\n")
        self._explain_end(reply)
        return reply

    def _print(self, text: str, style: str = "") -> None:
        if self.console.is_terminal:
            text = text.translate(CONTROL)
        self.console.print(Text(text, style=style), end="", soft_wrap=True)
        self.console.file.flush()

    def _side_by_side(self, sessions: Sequence[Session], respond: Respond, cancel: threading.Event) -> list[Reply]:
        replies = []
        for session in sessions:
            with self.console.status(f"{session.model.name} answers"):
                replies.append(respond(session, lambda piece: None, cancel))
        table = Table(expand=True, show_lines=False)
        for session in sessions:
            table.add_column(Text(session.model.name), ratio=1, overflow="fold")
        table.add_row(*[self._cell(reply) for reply in replies])
        self.console.print(table)
        for session, reply in zip(sessions, replies, strict=True):
            self._explain_end(reply, f"{session.model.name}: ")
        return replies

    def _cell(self, reply: Reply) -> Text:
        cell = Text()
        if reply.reasoning and self.console.is_terminal:
            cell.append(f"{reply.reasoning}\n\n".translate(CONTROL), REASONING_STYLE)
        return cell.append(reply.content.translate(CONTROL))

    def _explain_end(self, reply: Reply, who: str = "") -> None:
        if reply.finish_reason == "length":
            self.notice(f"{who}the answer was cut after {plural(reply.completion_tokens, 'token')} (--max_new_tokens)")
        elif reply.finish_reason == "canceled":
            self.notice(f"{who}stopped")
        elif not reply.content:
            self.notice(f"{who}the answer is empty")


@contextmanager
def _cancel_on_interrupt() -> Iterator[threading.Event]:
    """Gives an event that the first Ctrl-C sets; the second one raises KeyboardInterrupt."""
    cancel = threading.Event()

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)
