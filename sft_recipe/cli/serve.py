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
    check_not_empty,
    find_device,
    given_sampling,
    thinking,
)
from sft_recipe.errors import ConfigError, PreflightError, notify, run_command, silence_libraries

if TYPE_CHECKING:
    from types import FrameType

    from sft_recipe.chat.server import ChatServer

USAGE = "scripts/serve.py MODEL [--host 127.0.0.1] [--port 8000] [--api_key KEY] [FLAGS]"
DESCRIPTION = """\
Serves a trained model: /v1/chat/completions (also streamed), /v1/models and /health, for any client of the
OpenAI API. A run folder means its best checkpoint, else its newest one. Requests are answered one after another."""
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
    parser.add_argument("--host", default=LOCAL[0], help="address to listen at; 0.0.0.0: all (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: a free one (default: 8000)")
    parser.add_argument("--api_key", metavar="KEY", help=f"what clients must send; better in the variable {KEY}")
    parser.add_argument("--name", metavar="NAME", help="name of the model for clients (default: MODEL)")
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
        from sft_recipe.chat.compare import load_models
        from sft_recipe.chat.server import ChatServer

        device = find_device(options.device)
        (model,) = load_models(options.model, None, device, thinking(options), options.trust_remote_code)
        key = options.api_key or os.environ.get(KEY)
        name = options.name or options.model
        server = ChatServer(model, name, model.sampling.updated(options.sampling), key, _log)
        if options.host not in LOCAL and not key:
            notify(f"everyone who reaches {options.host} can use this server; {KEY} sets a key")
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"serving {name} at http://{host}:{listener.getsockname()[1]}/v1 (Ctrl-C ends it)", flush=True)
        _serve(server, listener)
    return 0


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
