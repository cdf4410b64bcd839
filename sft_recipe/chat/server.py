"""An OpenAI-compatible server, with a chat page; requests are answered one after another, in the order they came."""

import asyncio
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any
from weakref import WeakSet

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from sft_recipe.chat.model import ChatModel, Reply
from sft_recipe.chat.protocol import Answer, ApiError, parse_request
from sft_recipe.chat.sampling import Sampling
from sft_recipe.chat.session import Session
from sft_recipe.chat.text_stream import Piece
from sft_recipe.errors import DataError, RecipeError, first_line
from sft_recipe.language import plural

DISCONNECT_POLL_S = 0.5


class ChatServer:
    """Serves models by name, with `sampling` where a request gives no options, to those who have the key.

    Without `api_key` everyone may ask who reaches the server. `page` is the HTML of the address /, None for no page;
    it needs no key. `log` gets one line for each answer, without its text.
    """

    def __init__(
        self,
        models: Mapping[str, ChatModel],
        sampling: Sampling,
        api_key: str | None = None,
        page: str | None = None,
        log: Callable[[str], None] = lambda line: None,
    ):
        self.models, self.sampling, self.log = models, sampling, log
        self._key, self._html = api_key, page
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="answers")  # its queue is that of the requests
        self._jobs: WeakSet[_Job] = WeakSet()

    def app(self) -> FastAPI:
        """Return the application."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=self._lifespan)
        if self._html is not None:
            app.add_api_route("/", self._page, methods=["GET"], response_class=HTMLResponse)
        app.add_api_route("/health", self._health, methods=["GET"])
        app.add_api_route("/v1/models", self._models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self._model, methods=["GET"])
        app.add_api_route("/v1/chat/completions", self._complete, methods=["POST"], response_model=None)
        app.add_exception_handler(ApiError, _refuse)
        app.add_exception_handler(HTTPException, _refuse_http)
        return app

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        self._worker.shutdown(wait=False, cancel_futures=True)

    def end_answers(self) -> None:
        """End the answers that are being given and those that wait; for a server that is about to stop."""
        for job in list(self._jobs):
            job.cancel.set()

    async def _page(self) -> HTMLResponse:
        return HTMLResponse(self._html)

    async def _health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def _models(self, request: Request) -> dict[str, Any]:
        self._authorize(request)
        return {"object": "list", "data": [_description(name) for name in self.models]}

    async def _model(self, request: Request, name: str) -> dict[str, Any]:
        self._authorize(request)
        self._find(name)
        return _description(name)

    async def _complete(self, request: Request) -> Response:
        self._authorize(request)
        asked = parse_request(await request.body())
        sampling = self.sampling.updated(asked.options)
        session = Session(self._find(asked.model), sampling, asked.messages, asked.tools)
        job = _Job(session, asked.template_variables)
        self._jobs.add(job)
        self._worker.submit(job.run)
        answer = Answer(asked.model, asked.tools)
        if asked.stream:
            first = await job.next(request)  # an error has another status than a stream
            stream = self._stream(request, job, first, answer, asked.include_usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        while not isinstance(item := await job.next(request), Reply):
            pass
        self._log(item, job)
        return JSONResponse(answer.completion(item))

    async def _stream(
        self, request: Request, job: "_Job", item: Piece | Reply, answer: Answer, include_usage: bool
    ) -> AsyncIterator[str]:
        try:
            yield _event(answer.first_chunk())
            while isinstance(item, Piece):
                for chunk in answer.chunks(item):
                    yield _event(chunk)
                item = await job.next(request)
            for chunk in answer.last_chunks(item, include_usage):
                yield _event(chunk)
            yield "data: [DONE]\n\n"
            self._log(item, job)
        except ApiError as error:
            yield _event(error.body())
        finally:
            job.cancel.set()

    def _authorize(self, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = secrets.compare_digest(given.encode("latin-1"), (self._key or "").encode())
        if self._key and not (is_right and scheme.lower() == "bearer"):
            raise ApiError(401, "the API key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")

    def _find(self, name: str) -> ChatModel:
        if name not in self.models:
            known = " and ".join(self.models)
            raise ApiError(404, f"there is no model {name}; this server has {known}", "model", "model_not_found")
        return self.models[name]

    def _log(self, reply: Reply, job: "_Job") -> None:
        seconds = time.monotonic() - job.began
        rate = reply.completion_tokens / max(seconds, 1e-9)
        self.log(
            f"{time.strftime('%H:%M:%S')} prompt {reply.prompt_tokens}, answer "
            f"{plural(reply.completion_tokens, 'token')} ({reply.finish_reason}), {seconds:.1f} s, {rate:.1f} tokens/s"
        )


class _Job:
    """The answer to one request: made by the worker's thread, received piece by piece in the event loop."""

    def __init__(self, session: Session, variables: dict[str, Any]):
        self.cancel = threading.Event()
        self.began = self._polled = time.monotonic()
        self._session, self._variables = session, variables
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Piece | Reply | ApiError] = asyncio.Queue()

    def run(self) -> None:
        """Answer, in the worker's thread, unless the client has gone or the server ends meanwhile."""
        if self.cancel.is_set():
            self._put(ApiError(503, "the server is shutting down"))
            return
        self.began = time.monotonic()
        try:
            self._put(self._session.answer(self._put, self.cancel, self._variables))
        except DataError as error:
            code = "context_length_exceeded" if error.kind == "length" else None
            self._put(ApiError(400, str(error), "tools" if error.kind == "tools" else "messages", code))
        except RecipeError as error:
            self._put(ApiError(500, str(error)))
        except Exception as error:  # of torch or transformers, such as too little memory; the server goes on
            self._put(ApiError(500, f"the answer failed: {first_line(error)}"))

    def _put(self, item: Piece | Reply | ApiError) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def next(self, request: Request) -> Piece | Reply:
        """Return the next piece, or the reply at the end. Raises ApiError; a client that has gone ends the answer."""
        try:
            item = None
            while item is None:
                if time.monotonic() - self._polled >= DISCONNECT_POLL_S:
                    self._polled = time.monotonic()
                    if await request.is_disconnected():
                        raise ApiError(499, "the client has closed the connection")
                with suppress(asyncio.TimeoutError):
                    item = await asyncio.wait_for(self._items.get(), DISCONNECT_POLL_S)
        except BaseException:
            self.cancel.set()
            raise
        if isinstance(item, ApiError):
            raise item
        return item


def _description(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "sft_recipe"}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(error.body(), error.status, headers=headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    """An address or method that does not exist, in the form of the protocol."""
    assert isinstance(error, HTTPException)
    what = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not accept {request.method}"}
    message = what.get(error.status_code, str(error.detail))
    return await _refuse(request, ApiError(error.status_code, message))
