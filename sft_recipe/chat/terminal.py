"""The conversation in a terminal: questions, streamed answers, and commands that begin with a slash."""

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from sft_recipe.chat.display import Display, asking
from sft_recipe.chat.session import Session
from sft_recipe.errors import RecipeError
from sft_recipe.files import user_path

DEFAULT_FILE = "conversations.jsonl"
HELP = f"""\
/reset          start a new conversation; the system prompt stays
/system TEXT    set the system prompt; without TEXT show it, with "" remove it
/retry          another answer to the last question
/save [FILE]    append the conversation to FILE ({DEFAULT_FILE}), as a record that training reads
/help           this list
/exit           leave (also Ctrl-D); Ctrl-C ends an answer
Text that begins with // is a question that begins with /."""
COMMANDS = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]


class Terminal:
    """A Terminal reads what a user types, and lets one session answer it, or two sessions."""

    def __init__(self, sessions: Sequence[Session], display: Display, read_line: Callable[[str], str] = input):
        self.sessions, self.display, self._read_line = sessions, display, read_line
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": self._reset,
            "/system": self._system,
            "/retry": self._retry,
            "/save": self._save,
            "/help": self._help,
        }

    def run(self) -> None:
        """Answer until the user leaves; an error that a question causes is shown, and the conversation goes on."""
        self.display.notice("/help lists the commands; Ctrl-D leaves.")
        while (line := self._next_line()) is not None:
            try:
                self._handle(line)
            except RecipeError as error:
                self.display.notice(f"error: {error}")
            except OSError as error:
                self.display.notice(f"error: {error.filename} cannot be written: {error.strerror}")

    def _next_line(self) -> str | None:
        while True:
            try:
                line = self._read_line(">>> ").strip()
            except EOFError:
                return None
            except KeyboardInterrupt:
                self.display.notice("\nCtrl-D or /exit leaves.")
                continue
            if line in ("/exit", "/quit"):
                return None
            if line:
                return line

    def _handle(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            name, _, argument = line.partition(" ")
            command = self._commands.get(name)
            if command:
                command(argument.strip())
            else:
                near = difflib.get_close_matches(name, [*self._commands, "/exit"], n=1)
                hint = f"did you mean {near[0]}?" if near else "/help lists all"
                self.display.notice(f"there is no command {name}; {hint}")
            return
        self.display.answer(self.sessions, asking(line.removeprefix("/")))

    def _reset(self, _: str) -> None:
        for session in self.sessions:
            session.reset()
        self.display.notice("new conversation")

    def _system(self, text: str) -> None:
        if text:
            for session in self.sessions:
                session.set_system("" if text in ('""', "''") else text)
        system = self.sessions[0].system
        self.display.notice(f"system prompt: {system}" if system else "there is no system prompt")

    def _retry(self, _: str) -> None:
        self.display.answer(self.sessions, Session.retry)
        if not any(session.sampling.temperature for session in self.sessions):
            self.display.notice("greedy decoding always gives the same answer; start with --temperature 0.7 for others")

    def _save(self, name: str) -> None:
        path = user_path(name or DEFAULT_FILE)
        _append(path, [session.record() for session in self.sessions])
        self.display.notice(f"appended to {path}")

    def _help(self, _: str) -> None:
        self.display.notice(HELP)


def _append(path: Path, records: Sequence[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
