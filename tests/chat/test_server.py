"""The server speaks the OpenAI protocol: answers, streams and errors, as the openai client and httpx see them."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
import torch
import uvicorn

from sft_recipe.chat.protocol import ApiError, parse_request
from sft_recipe.chat.sampling import Sampling
from sft_recipe.chat.server import ChatServer
from sft_recipe.chat.session import Session
from sft_recipe.chat.text_stream import Piece
from sft_recipe.cli.serve import main
from tests.chat.conftest import ANSWER, load
from tests.chat.scripted import build_scripted_model
from tests.support import tiny
from tests.support.runs import ROOT

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
BODY = {"model": "paris", "messages": QUESTION}


@contextmanager
def serving(model, **options):
    """Serve a model, or a given server, at a free port; gives the address."""
    chat = model if isinstance(model, ChatServer) else ChatServer({"paris": model}, Sampling(), **options)
    server = uvicorn.Server(uvicorn.Config(chat.app(), log_config=None, access_log=False, timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def url(scripted):
    with serving(load(scripted)) as address:
        yield address


def post(url, body, **options):
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, **options)


def stream(url, body):
    """The events of a stream, without the last one."""
    *events, done, end = post(url, {**body, "stream": True}).text.split("\n\n")
    assert done == "data: [DONE]" and end == ""
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_openai_client_talks_to_it(scripted):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    with serving(load(scripted), api_key="secret") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret")
        assert [model.id for model in client.models.list()] == ["paris"]
        answer = client.chat.completions.create(model="paris", messages=QUESTION, temperature=0)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (ANSWER, "stop")
        assert answer.usage.completion_tokens == 9
        history = [*QUESTION, answer.choices[0].message, *QUESTION]  # the object itself, as programs send it back
        chunks = list(client.chat.completions.create(model="paris", messages=history, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="rome", messages=QUESTION)
        with pytest.raises(openai.BadRequestError, match="temperature is -1"):
            client.chat.completions.create(model="paris", messages=QUESTION, temperature=-1)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()


def test_completion(url):
    answer = post(url, BODY).json()
    assert answer["object"] == "chat.completion" and answer["model"] == "paris" and answer["id"]
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER} and choice["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 9 and usage["total_tokens"] == usage["prompt_tokens"] + 9
    assert post(url, BODY | {"max_tokens": 2}).json()["choices"][0]["finish_reason"] == "length"
    assert post(url, BODY | {"stop": "capital"}).json()["choices"][0]["message"]["content"] == "Paris, the "


def test_stream(url):
    first, *pieces, end, usage = stream(url, BODY | {"stream_options": {"include_usage": True}})
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [piece["choices"][0]["delta"]["content"] for piece in pieces][:3] == ["Pa", "ris", ","]
    assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == ANSWER
    assert end["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 9
    assert len({event["id"] for event in (first, *pieces, end, usage)}) == 1
    assert len(stream(url, BODY)) == len(pieces) + 2


def test_reasoning_has_a_field(tmp_path):
    tokenizer = tiny.build_tokenizer(special_tokens=[*tiny.SPECIAL, "<think>", "</think>"])
    folder = build_scripted_model(tmp_path / "model", "<think>It is</think>Paris.", tokenizer)
    with serving(load(folder)) as url:
        message = post(url, BODY).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "Paris.", "reasoning_content": "It is"}
        deltas = [event["choices"][0]["delta"] for event in stream(url, BODY)]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "It is"
        assert "".join(delta.get("content", "") for delta in deltas) == "Paris."


def test_health_and_models(url):
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    models = httpx.get(f"{url}/v1/models").json()
    assert models["object"] == "list" and [model["id"] for model in models["data"]] == ["paris"]
    assert httpx.get(f"{url}/v1/models/paris").json()["id"] == "paris"


def test_key_is_required_everywhere_but_for_health(scripted):
    with serving(load(scripted), api_key="sécret") as url:
        wrong = ("Bearer no", "Bearer", "Basic sécret", "sécret")
        for answer in (post(url, BODY), *(post(url, BODY, headers={"Authorization": text.encode()}) for text in wrong)):
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        right = {"Authorization": "Bearer sécret".encode()}
        assert post(url, BODY, headers=right).status_code == 200


@pytest.mark.parametrize(
    ("change", "status", "param", "message"),
    [
        ({"model": "rome"}, 404, "model", "there is no model rome; this server has paris"),
        ({"messages": []}, 400, "messages", "messages is empty"),
        ({"messages": "Hi"}, 400, "messages", "messages is text; expected a list"),
        ({"messages": None}, 400, "messages", "messages is missing"),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, 400, "messages[0].role", "messages[0].role is 'bot'"),
        ({"messages": [{"role": [], "content": "Hi"}]}, 400, "messages[0].role", "messages[0].role is []"),
        ({"messages": [{"role": {}, "content": "Hi"}]}, 400, "messages[0].role", "messages[0].role is {}"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "messages[0].content is missing"),
        ({"messages": ["Hi"]}, 400, "messages[0]", "messages[0] is text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages[0].content",
            "a part that is not text",
        ),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, 400, "messages", "half of a character"),
        ({"temperature": "hot"}, 400, "temperature", "temperature is 'hot'; it must be a number from 0"),
        ({"max_tokens": 0}, 400, "max_tokens", "max_tokens is 0; it must be a whole number from 1"),
        ({"temperature": 10**400}, 400, "temperature", "temperature is 1000"),
        ({"top_k": 10**400}, 400, "top_k", "it must be a whole number from 0 to 2147483647"),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 400, "max_tokens", "are the same limit and differ"),
        ({"temprature": 1}, 400, "temprature", "unknown parameter temprature; did you mean temperature?"),
        ({"n": 2}, 400, "n", "n=2 is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "tools[0]", "tools[0] is no function; expected {"),
        ({"tools": {}}, 400, "tools", "tools is an object; expected a list"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "does not show tools"),
        ({"tool_choice": "required"}, 400, "tool_choice", "is not supported"),
        ({"messages": [{"role": "tool"}]}, 400, "messages[0].content", "messages[0].content is missing"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            400,
            "messages[0].tool_calls",
            "messages[0].tool_calls[0].arguments is not",
        ),
        ({"stream": "yes"}, 400, "stream", "stream is text; expected true or false"),
        ({"chat_template_kwargs": {"style": 1}}, 400, "messages", "has no variable style"),
        ({"messages": [{"role": "user", "content": "a " * 600}]}, 400, "messages", "the model's context is 512"),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_bad_requests_get_errors_of_the_protocol(url, change, status, param, message, streams):
    body = json.dumps({**BODY, "stream": streams, **change})
    answer = httpx.post(f"{url}/v1/chat/completions", content=body, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert message in error["message"]


@pytest.mark.parametrize(("body", "status"), [({"model": "\ud800"}, 404), ({"\ud800": 1}, 400)])
def test_half_a_character_in_a_name_is_an_error_of_the_protocol(url, body, status):
    answer = httpx.post(f"{url}/v1/chat/completions", content=json.dumps({**BODY, **body}), timeout=60)
    assert answer.status_code == status and "\\ud800" in answer.json()["error"]["message"]


@pytest.mark.parametrize("options", [{"temperature": 2}, {"temperature": 1, "repetition_penalty": 2}, {"top_p": 1}])
def test_numbers_without_a_fraction_are_answered(url, options):
    answer = httpx.post(f"{url}/v1/chat/completions", content=json.dumps({**BODY, **options}), timeout=60)
    assert answer.status_code == 200, answer.text


def test_other_addresses_and_bodies(url):
    assert httpx.post(f"{url}/v1/chat/completions", content=b"{").json()["error"]["message"] == "the body is not JSON"
    assert httpx.post(f"{url}/v1/chat/completions", content=b"[]").status_code == 400
    error = httpx.get(f"{url}/v1/completions")
    assert error.status_code == 404 and error.json()["error"]["message"] == "there is no /v1/completions"
    assert httpx.get(f"{url}/v1/chat/completions").status_code == 405


def test_what_clients_send_without_effect_is_accepted():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {
        "model": "m",
        "messages": [
            {"role": "developer", "content": parts},
            {"role": "assistant", "content": "c", "tool_calls": None},
        ],
        "n": 1,
        "presence_penalty": 0.0,
        "logprobs": False,
        "response_format": {"type": "text"},
        "user": "me",
        "seed": None,
        "max_completion_tokens": 7,
    }
    asked = parse_request(json.dumps(body).encode())
    assert asked.messages == [{"role": "system", "content": "ab"}, {"role": "assistant", "content": "c"}]
    assert asked.options == {"max_new_tokens": 7}
    with pytest.raises(ApiError):
        parse_request(json.dumps(body | {"presence_penalty": 0.5}).encode())


def test_requests_are_answered_one_after_another(scripted, monkeypatch):
    """Several at once: each gets its own answer, and no two are generated at the same time."""
    running, most, original = [], [], Session.answer

    def answer(self, emit, cancel, variables):
        running.append(self)
        most.append(len(running))
        try:
            return original(self, emit, cancel, variables)
        finally:
            running.remove(self)

    monkeypatch.setattr(Session, "answer", answer)
    with serving(load(scripted)) as url, ThreadPoolExecutor(6) as clients:
        bodies = [BODY | {"max_tokens": count} for count in range(1, 7)]
        answers = list(clients.map(lambda body: post(url, body).json()["usage"]["completion_tokens"], bodies))
    assert answers == [1, 2, 3, 4, 5, 6] and set(most) == {1}


@pytest.mark.parametrize("streams", [False, True])
def test_answer_of_a_client_that_has_gone_ends(scripted, monkeypatch, streams):
    """The answer would go on until it is canceled, and the next client would wait for it."""
    canceled, original = threading.Event(), Session.answer

    def answer(self, emit, cancel, variables):
        if self.sampling.max_new_tokens == 99:
            while not cancel.wait(0.02):
                emit(Piece("answer", "again "))
            canceled.set()
        return original(self, emit, cancel, variables)

    monkeypatch.setattr(Session, "answer", answer)
    with serving(load(scripted)) as url:
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.stream(
                "POST", f"{url}/v1/chat/completions", json=BODY | {"max_tokens": 99, "stream": streams}, timeout=1
            ) as response,
        ):
            next(response.iter_text())
            raise httpx.ReadTimeout("the client goes")
        assert canceled.wait(60)
        assert post(url, BODY).json()["choices"][0]["message"]["content"] == ANSWER


def test_answers_end_when_the_server_does(scripted, monkeypatch):
    """One is being given, one waits; both clients get a reply."""
    began, original = threading.Event(), Session.answer

    def answer(self, emit, cancel, variables):
        began.set()
        cancel.wait(60)
        return original(self, emit, cancel, variables)

    monkeypatch.setattr(Session, "answer", answer)
    server = ChatServer({"paris": load(scripted)}, Sampling())
    with serving(server) as url, ThreadPoolExecutor(2) as clients:
        first = clients.submit(post, url, BODY)
        assert began.wait(60)
        second = clients.submit(post, url, BODY)
        while len(server._jobs) < 2:
            time.sleep(0.01)
        server.end_answers()
        assert first.result().json()["choices"][0]["message"]["content"] == "Pa"
        assert second.result().status_code == 503


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "cpu has too little free memory for 19 tokens"),
        (RuntimeError("device-side assert"), "the answer failed: device-side assert"),
    ],
)
def test_failure_of_one_answer_does_not_end_the_server(scripted, monkeypatch, failure, message):
    model = load(scripted)
    original = model._module.generate

    def generate(**options):
        if options["generation_config"].max_new_tokens == 99:
            raise failure
        return original(**options)

    monkeypatch.setattr(model._module, "generate", generate)
    with serving(model) as url:
        failed = post(url, BODY | {"max_tokens": 99})
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        assert message in failed.json()["error"]["message"]
        assert post(url, BODY).status_code == 200


def test_script_serves_until_ctrl_c(scripted, tmp_path):
    """The script from another folder; the key and the texts do not appear in what it prints."""
    command = [ROOT / "scripts/serve.py", scripted, "--port", "0", "--name", "paris", "--api_key", "secret-key"]
    environment = {"PATH": "/usr/bin:/bin", "VIRTUAL_ENV": sys.prefix, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as server:
        try:
            line = server.stdout.readline()
            url = line.split(" at ")[1].split("/v1")[0]
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    answer = post(url, BODY, headers={"Authorization": "Bearer secret-key"})
                    break
                except httpx.ConnectError:
                    time.sleep(0.1)
            assert answer.json()["choices"][0]["message"]["content"] == ANSWER
            server.send_signal(signal.SIGINT)
            out, err = server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == 0, err
    assert line.startswith("serving paris at http://127.0.0.1:")
    assert "answer 9 tokens (stop)" in err and err.count("\n") == 1
    assert "secret-key" not in line + out + err and "Paris" not in out + err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "required: MODEL"),
        (["MODEL", "--port", "65536"], "--port is 65536"),
        (["MODEL", "--port", "PORT"], "Address already in use; choose another with --host or --port"),
        (["MODEL", "--host", "nowhere.invalid"], "cannot listen at nowhere.invalid"),
        (["MODEL", "--api_key", ""], "--api_key needs a value"),
        (["MODEL", "--top_p", "2"], "--top_p is 2.0"),
        (["/nowhere/model", "--port", "0"], "there is no model at /nowhere/model"),
    ],
)
def test_invalid_input_is_one_line_and_code_2(args, message, scripted, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {"MODEL": str(scripted), "PORT": str(taken.getsockname()[1])}
        assert main([places.get(word, word) for word in args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
