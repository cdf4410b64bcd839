"""The conversation in the terminal, and lists of prompts, as a user sees them."""

import io
import json
import signal

import pytest
from rich.console import Console

from sft_recipe.chat.display import Display
from sft_recipe.chat.prompt_file import read_prompts
from sft_recipe.chat.sampling import Sampling
from sft_recipe.chat.session import Session
from sft_recipe.chat.terminal import Terminal
from sft_recipe.chat.text_stream import Piece
from sft_recipe.cli.chat import main
from sft_recipe.data.formats import read_conversations
from sft_recipe.errors import DataError
from tests.chat.conftest import ADAPTED, ANSWER, load
from tests.chat.scripted import build_scripted_model
from tests.support import tiny
from tests.support.runs import ROOT

QUESTION = "What is the capital of France?"


def talk(sessions, *lines, width=100):
    """Type these lines, then Ctrl-D; return what the terminal shows."""
    typed = iter(lines)

    def read_line(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, highlight=False, color_system="standard")
    Terminal(sessions, Display(console), read_line).run()
    return screen.getvalue()


def test_conversation_with_commands(model, tmp_path):
    session = Session(model, Sampling())
    file = tmp_path / "saved.jsonl"
    shown = talk([session], "/system Be brief.", QUESTION, "", "/retry", f"/save {file}", "//what", "/reset", "/rest")
    assert shown.count(ANSWER) == 3
    assert "system prompt: Be brief." in shown and "greedy decoding always gives the same answer" in shown
    assert "there is no command /rest; did you mean /reset?" in shown
    assert session.messages == [{"role": "system", "content": "Be brief."}]
    (saved,) = read_conversations(file)
    assert [m.content for m in saved.messages] == ["Be brief.", QUESTION, ANSWER]


def test_slash_is_escaped_and_errors_do_not_end_the_conversation(model, tmp_path):
    session = Session(model, Sampling())
    shown = talk(
        [session], "/retry", "/save", f"/save {tmp_path}", "//what is this", f"/save {tmp_path}", "/exit", "no"
    )
    assert "error: there is no answer to replace yet" in shown and "cannot be written: Is a directory" in shown
    assert [message["content"] for message in session.messages] == ["/what is this", ANSWER]


def test_reasoning_is_dimmed(tmp_path):
    tokenizer = tiny.build_tokenizer(special_tokens=[*tiny.SPECIAL, "<think>", "</think>"])
    folder = build_scripted_model(tmp_path / "model", "<think>It is</think>Paris.", tokenizer)
    shown = talk([Session(load(folder), Sampling())], QUESTION)
    assert shown.endswith("\x1b[2mI\x1b[0m\x1b[2mt\x1b[0m\x1b[2m is\x1b[0m\n\nParis.\n")


def test_answers_cannot_control_the_terminal(model):
    def respond(session, emit, cancel):
        emit(Piece("answer", "a\x1b[31mb\rc\x9b\u202ed\u2066\n"))
        return session.ask(QUESTION)

    screen = io.StringIO()
    Display(Console(file=screen, force_terminal=True, highlight=False)).answer([Session(model, Sampling())], respond)
    assert screen.getvalue().startswith("a[31mbcd\n")


def test_first_ctrl_c_ends_the_answer_and_the_second_one_the_program(model):
    def interrupt(times):
        def respond(session, emit, cancel):
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            return session.ask(QUESTION, emit, cancel)

        return respond

    screen = io.StringIO()
    display = Display(Console(file=screen, force_terminal=True, highlight=False))
    (reply,) = display.answer([Session(model, Sampling())], interrupt(1))
    assert reply.finish_reason == "canceled" and "stopped" in screen.getvalue()
    with pytest.raises(KeyboardInterrupt):
        display.answer([Session(model, Sampling())], interrupt(2))


def test_two_models_answer_side_by_side(adapter):
    tuned = load(adapter)
    sessions = [Session(model, Sampling()) for model in (tuned.without_adapter("base"), tuned)]
    lines = talk(sessions, QUESTION, "/retry").splitlines()
    both = [line for line in lines if ANSWER in line]
    assert len(both) == 2 and all(line.index(ANSWER) < line.index(ADAPTED.strip()) for line in both)
    assert [session.messages[-1]["content"] for session in sessions] == [ANSWER, ADAPTED]


def run_command(args, capsys, monkeypatch, stdin=""):
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    code = main([str(word) for word in args])
    return code, *capsys.readouterr()


def test_question_through_a_pipe_is_answered_alone(scripted, capsys, monkeypatch):
    code, out, err = run_command([scripted], capsys, monkeypatch, f"{QUESTION}\nPlease.\n")
    assert (code, out, err) == (0, f"{ANSWER}\n", "")
    code, out, err = run_command([scripted, "--max_new_tokens", 2], capsys, monkeypatch, QUESTION)
    assert (code, out) == (0, "Paris\n") and "cut after 2 tokens" in err


def test_commands_in_a_pipe_are_text_of_the_question_and_a_notice_says_so(scripted, capsys, monkeypatch):
    code, out, err = run_command([scripted], capsys, monkeypatch, f"{QUESTION}\n/save a.jsonl\n/etc is a folder\n")
    assert (code, out) == (0, f"{ANSWER}\n")
    assert err == "notice: /save: stdin is one question; commands are read from a terminal only\n"


def test_list_of_prompts(scripted, tmp_path, capsys, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffOne?\n\n二？\n")
    code, out, _ = run_command([scripted, "--prompts", file], capsys, monkeypatch)
    assert code == 0 and out == f"\n[1/2] One?\n{ANSWER}\n\n[2/2] 二？\n{ANSWER}\n"


def test_list_as_json_with_comparison(adapter, scripted, tmp_path, capsys, monkeypatch):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(["Two\nlines?", "二？"]))
    args = [adapter, "--prompts", file, "--compare", "--json", "--system", "Be brief."]
    code, out, err = run_command(args, capsys, monkeypatch)
    assert (code, err) == (0, "")
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["prompt"] for record in records] == ["Two\nlines?", "二？"]
    for record in records:
        answers = [(answer["model"], answer["answer"]) for answer in record["answers"]]
        assert answers == [(str(scripted), ANSWER), (str(adapter), ADAPTED)]
        assert record["answers"][0] | {"prompt_tokens": 0} == {
            "model": str(scripted),
            "answer": ANSWER,
            "reasoning": "",
            "finish_reason": "stop",
            "prompt_tokens": 0,
            "completion_tokens": 9,
        }


@pytest.mark.parametrize(("name", "count"), [("chinese", 5), ("mixed", 8)])
def test_lists_that_are_part_of_the_repository(name, count):
    prompts = read_prompts(ROOT / f"data/prompts/{name}.txt")
    assert len(set(prompts)) == count


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "has no prompts"),
        ("a.txt", b"\xff", "it is not UTF-8"),
        ("a.json", b"[", "is not JSON"),
        ("a.json", b'[{"prompt": 1}]', "expected a JSON list of texts"),
        ("a.json", b"[]", "has no prompts"),
    ],
)
def test_invalid_lists_are_one_message(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "required: MODEL"),
        ([""], "MODEL needs a value"),
        (["MODEL", "--prompts", "/nowhere/a.txt"], "the prompts /nowhere/a.txt cannot be read"),
        (["MODEL", "--prompts", ""], "--prompts needs a value"),
        (["MODEL", "--temperature", "-1"], "--temperature is -1.0; it must be a number from 0"),
        (["MODEL", "--temperature", "hot"], "--temperature"),
        (["MODEL", "--greedy", "--top_k", "5"], "--greedy and --top_k contradict each other"),
        (["MODEL", "--device", "cuda:99"], "--device cuda:99"),
        (["MODEL", "--device", "gpu"], "it must be auto, cpu"),
        (["MODEL", "--device", "meta"], "it must be auto, cpu"),
        (["MODEL", "--compare"], "--compare BASE"),
        (["MODEL", "--enable_thinking", "true"], "no such switch"),
        (["/nowhere/model"], "there is no model at /nowhere/model"),
        (["MODEL", "--tempreature", "1"], "--tempreature"),
    ],
)
def test_invalid_input_is_one_line_and_code_2(args, message, scripted, capsys, monkeypatch):
    args = [scripted if word == "MODEL" else word for word in args]
    code, _, err = run_command(args, capsys, monkeypatch, QUESTION)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_empty_stdin_is_one_message(scripted, capsys, monkeypatch):
    code, _, err = run_command([scripted], capsys, monkeypatch, " \n")
    assert code == 2 and "stdin is empty" in err
