"""scripts/serve.py: serves a trained model through an OpenAI-compatible API.

Its command line is read with the standard library only, so that --help works before the installation.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from sft_recipe.cli.flags import Parser
from sft_recipe.cli.sampling_flags import (
    add_model_flags,
    add_sampling_flags,
    add_thinking_flag,
    check_not_empty,
    find_device,
    given_sampling,
    thinking,
)
from sft_recipe.errors import ConfigError, ModelError, PreflightError, notify, run_command, silence_libraries

if TYPE_CHECKING:
    from types import FrameType

    from sft_recipe.chat.model import ChatModel
    from sft_recipe.chat.server import ChatServer

USAGE = "scripts/serve.py MODEL [--web] [--host 127.0.0.1] [--port 8000] [--api_key KEY] [FLAGS]"
DESCRIPTION = """\
Serves a trained model: /v1/chat/completions (also streamed), /v1/models and /health, for any client of the
OpenAI API; with --web also a chat page that compares it with the model that it was trained from. A run folder
means its best checkpoint, else its newest one. Requests are answered one after another."""
LOCAL = ("127.0.0.1", "localhost", "::1")
KEY = "SFT_API_KEY"
SHUTDOWN_S = 5  # for the last tokens of answers that are being given when the server ends


def main(args: list[str]) -> int:
    """Run a command line; returns the exit code: 0 after Ctrl-C, 2 an error that the message explains."""
    return run_command(lambda: run(parse_arguments(args)))


def parse_arguments(args: list[str]) -> argparse.Namespace:
    """Return the parsed command line. Raises ConfigError if it is invalid; --help prints the help and exits."""
    parser = Parser(USAGE, DESCRIPTION)
    add_model_flags(parser)
    add_thinking_flag(parser)
    parser.add_argument("--host", default=LOCAL[0], help="address to listen at; 0.0.0.0: all (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: a free one (default: 8000)")
    parser.add_argument("--api_key", metavar="KEY", help=f"what clients must send; better in the variable {KEY}")
    parser.add_argument("--name", metavar="NAME", help="name of the model for clients (default: MODEL)")
    parser.add_argument(
        "--web", action="store_true", help="also serve a chat page, and the model before training where it is known"
    )
    add_sampling_flags(parser)
    options = parser.parse_args(args)
    check_not_empty(options, "model", "device", "host", "api_key", "name")
    if not 0 <= options.port < 2**16:
        raise ConfigError(f"--port is {options.port}; it must be a number from 0 to 65535")
    options.sampling = given_sampling(options)
    return options


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C, and return 0. Raises ModelError, ConfigError, and PreflightError for a port in use."""
    silence_libraries(shows_progress=False)
    with _bind(options.host, options.port) as listener:
        models = _load_models(options)
        key = options.api_key or os.environ.get(KEY)
        sampling = next(iter(models.values())).sampling.updated(options.sampling)
        from sft_recipe.chat.server import ChatServer
        from sft_recipe.chat.web import chat_page

        server = ChatServer(models, sampling, key, chat_page() if options.web else None, _log)
        if options.host not in LOCAL and not key:
            notify(f"everyone who reaches {options.host} can use this server; {KEY} sets a key")
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{host}:{listener.getsockname()[1]}"
        page = f"; the chat page is {address}/" if options.web else ""
        print(f"serving {' and '.join(models)} at {address}/v1{page} (Ctrl-C ends it)", flush=True)
        _serve(server, listener)
    return 0


def _load_models(options: argparse.Namespace) -> dict[str, ChatModel]:
    """Return the model by its name; for the page also the one that it was trained from, where that can be loaded."""
    from sft_recipe.chat.compare import load_models
    from sft_recipe.chat.source import find_source

    device, name = find_device(options.device), options.name or options.model
    arguments = device, thinking(options), options.trust_remote_code
    source = find_source(options.model, options.trust_remote_code) if options.web else None
    base = source.trained_from if source else None
    shown = (source.base_name if source else None) or base
    if base and shown and shown != name:
        try:
            before, trained = load_models(options.model, base, *arguments)
            return {name: trained, shown: before}
        except ModelError as error:
            notify(f"the page has no comparison with {base}: {error}")
    (model,) = load_models(options.model, None, *arguments)
    return {name: model}


def _serve(server: ChatServer, listener: socket.socket) -> None:
    """Serve until a signal; answers that are being given end at once."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            server.end_answers()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(server.app(), log_config=None, access_log=False, timeout_graceful_shutdown=SHUTDOWN_S)
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again when it has stopped
        Server(config).run(sockets=[listener])


def _bind(host: str, port: int) -> socket.socket:
    """Reserve the port before the model is loaded, which takes longer."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise PreflightError(
            f"cannot listen at {host}, port {port}: {error.strerror or error}; choose another with --host or --port "
            "(0: a free one)"
        ) from None
    return listener


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
