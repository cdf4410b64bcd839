"""The chat page in a real browser: it streams, compares, stops, and contacts nothing but its server."""

from dataclasses import replace

import pytest
import torch

from sft_recipe.chat.compare import load_models
from sft_recipe.chat.sampling import Sampling
from sft_recipe.chat.server import ChatServer
from sft_recipe.chat.session import Session
from sft_recipe.chat.source import find_source
from sft_recipe.chat.text_stream import Piece
from sft_recipe.chat.web import chat_page
from sft_recipe.cli import serve
from tests.chat.conftest import ADAPTED, ANSWER, load
from tests.chat.scripted import build_scripted_model
from tests.chat.test_server import serving
from tests.support import tiny
from tests.support.browser import browsing, needs_chromium

pytestmark = needs_chromium
IDLE = "!document.querySelector('#send').hidden && !document.querySelector('#send').disabled"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(browser):
    browser.problems.clear()
    browser.addresses.clear()
    yield browser
    assert browser.problems == []


@pytest.fixture(scope="module")
def models(scripted, adapter):
    """The trained model and, before training, its base; in the order of the server."""
    before, after = load_models(str(adapter), str(scripted), torch.device("cpu"))
    return {"after": after, "before": before}


@pytest.fixture(scope="module")
def url(models):
    with serving(ChatServer(models, Sampling(), page=chat_page())) as address:
        yield address


def ask(page, text):
    page.type("#question", text)
    page.press("Enter")
    page.wait(IDLE)


def test_both_models_answer_side_by_side(page, url, monkeypatch):
    asked, original = [], Session.answer

    def answer(self, *rest):
        asked.append([(turn["role"], turn["content"]) for turn in self.messages])
        return original(self, *rest)

    monkeypatch.setattr(Session, "answer", answer)
    page.open(url)
    page.wait(IDLE)
    assert page.texts("h1") == ["after"] and page.run("document.title") == "Chat: after"
    page.type("#system", "Be <b>brief</b>.")
    ask(page, "<img src=x> Hi")
    assert page.texts(".answer h2") == ["before", "after"] and page.texts(".question") == ["<img src=x> Hi"]
    assert page.texts(".answer > .text") == [ANSWER, ADAPTED]
    ask(page, "Again?")
    assert page.texts(".answer > .text") == [ANSWER, ADAPTED] * 2
    first = [("system", "Be <b>brief</b>."), ("user", "<img src=x> Hi")]
    histories = [[*first, ("assistant", text), ("user", "Again?")] for text in (ANSWER, ADAPTED)]
    assert sorted(asked, key=len)[:2] == [first, first] and sorted(asked[2:]) == sorted(histories)
    assert page.run("document.querySelectorAll('#talk img, #talk b').length") == 0
    assert page.addresses and all(address.startswith(url) for address in page.addresses)


def test_without_comparison_and_a_new_conversation(page, url):
    page.open(url)
    page.wait(IDLE)
    page.click("#compare")
    ask(page, "Hi")
    assert page.texts(".answer h2") == ["after"] and page.texts(".answer > .text") == [ADAPTED]
    page.click("#reset")
    assert page.texts(".answer, .question") == []


def test_new_line_and_narrow_window(page, url):
    page.open(url, width=390, height=600, scheme="dark")
    page.wait(IDLE)
    page.type("#question", "One")
    page.press("Enter", shift=True)
    page.call("Input.insertText", text="two " * 60)
    page.press("Enter")
    page.wait(IDLE)
    assert page.texts(".question") == [f"One\n{'two ' * 60}".strip()]
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.run("scrollY > 0 && scrollY + innerHeight >= document.documentElement.scrollHeight - 1")
    tops = page.run("[...document.querySelectorAll('.answer')].map(one => one.getBoundingClientRect().top)")
    assert tops[0] < tops[1]


def test_errors_are_shown_and_are_no_part_of_the_conversation(page, url):
    page.open(url)
    page.wait(IDLE)
    page.type("#temperature", "-1")
    ask(page, "Hi")
    assert page.texts(".failed .muted") == ["temperature is -1; it must be a number from 0 to 100"] * 2
    page.run("document.querySelector('#temperature').value = ''")
    page.type("#max_tokens", "2")
    ask(page, "Hello")
    assert page.texts(".answer .muted")[2:] == ["cut off at the largest number of tokens"] * 2


def test_an_answer_can_be_stopped(page, url, monkeypatch):
    original = Session.answer

    def answer(self, emit, cancel, variables):
        if self.messages[-1]["content"] == "Go on":
            emit(Piece("answer", "again "))
            cancel.wait(60)
        return original(self, emit, cancel, variables)

    monkeypatch.setattr(Session, "answer", answer)
    page.open(url)
    page.wait(IDLE)
    page.type("#question", "Go on")
    page.press("Enter")
    page.wait("document.querySelector('.answer > .text')?.textContent === 'again '")
    page.click("#stop")
    page.wait(IDLE)
    assert page.texts(".answer .muted") == ["stopped", "stopped"]
    ask(page, "Hi")
    assert page.texts(".answer > .text")[2:] == [ANSWER, ADAPTED]


def test_key_and_reasoning(page, tmp_path):
    tokenizer = tiny.build_tokenizer(special_tokens=[*tiny.SPECIAL, "<think>", "</think>"])
    folder = build_scripted_model(tmp_path / "model", "<think>It is</think>Paris.", tokenizer)
    with serving(ChatServer({"paris": load(folder)}, Sampling(), "secret", chat_page())) as url:
        page.open(url)
        page.wait("!document.querySelector('#login').hidden")
        assert page.texts("#state") == ["The server asks for its key."] and page.run(
            "document.querySelector('#send').disabled"
        )
        page.type("#key", "wrong")
        page.press("Enter")
        page.type("#key", "secret")
        page.press("Enter")
        page.wait(IDLE)
        assert page.run("document.querySelector('#compare-label').hidden && document.querySelector('#login').hidden")
        ask(page, "Hi")
        assert page.texts(".thoughts .text") == ["It is"] and page.texts(".answer > .text") == ["Paris."]
        assert not page.run("document.querySelector('.thoughts').open")


def test_flag_serves_the_page_and_the_model_before_training(adapter, scripted, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(serve, "_serve", lambda server, listener: served.append(server))
    for flags in (["--web", "--name", "after"], ["--name", "after"]):
        assert serve.main([str(adapter), "--port", "0", "--device", "cpu", *flags]) == 0
    with_page, without = served
    assert list(with_page.models) == ["after", str(scripted)] and list(without.models) == ["after"]
    lines = capsys.readouterr().out.splitlines()
    assert "; the chat page is http://127.0.0.1:" in lines[0] and "page" not in lines[1]
    paths = [{route.path for route in server.app().routes} for server in served]
    assert paths[0] - paths[1] == {"/"}


def test_model_before_training_that_has_moved_is_a_notice(scripted, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(serve, "_serve", lambda server, listener: served.append(server))
    found = replace(find_source(str(scripted)), trained_from="/nowhere/base")
    monkeypatch.setattr("sft_recipe.chat.source.find_source", lambda *_: found)
    assert serve.main([str(scripted), "--port", "0", "--device", "cpu", "--web"]) == 0
    assert list(served[0].models) == [str(scripted)]
    assert "notice: the page has no comparison with /nowhere/base" in capsys.readouterr().err
