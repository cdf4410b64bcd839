"""Tools of a request are in the prompt as in training, and the calls in an answer are objects of the protocol."""

import json

import pytest

from sft_recipe.chat.tools import split_tool_calls
from sft_recipe.data.rendering.prompt import PromptRenderer
from sft_recipe.errors import DataError
from tests.chat.conftest import load
from tests.chat.scripted import build_scripted_model
from tests.chat.test_server import post, serving, stream
from tests.support import tiny

TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = '{"name": "weather", "arguments": {"city": "Paris"}}'
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
BODY = {"model": "paris", "messages": QUESTION, "tools": [TOOL]}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny.build_tokenizer(TEMPLATE)
    tokenizer.add_tokens(["<tool_call>", CALL, "</tool_call>"])
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A model that answers with some text and a call."""
    answer = f"Paris.<tool_call>{CALL}</tool_call>"
    return load(build_scripted_model(tmp_path_factory.mktemp("tools") / "model", answer, tokenizer))


@pytest.fixture(scope="module")
def url(model):
    with serving(model) as address:
        yield address


def test_openai_client_gets_calls_and_sends_results(url):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    choice = client.chat.completions.create(**BODY).choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Paris.")
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "weather",
        {"city": "Paris"},
    )
    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees"}
    history = [*QUESTION, choice.message, result]
    assert client.chat.completions.create(**{**BODY, "messages": history}).choices[0].finish_reason == "tool_calls"
    chunks = list(client.chat.completions.create(**BODY, stream=True))
    (streamed,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert (streamed.index, streamed.function.name, streamed.function.arguments) == (
        0,
        "weather",
        call.function.arguments,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Paris."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_text_stays_text_without_tools_and_where_none_may_be_called(url):
    for change in ({"tools": []}, {"tool_choice": "none"}):
        choice = post(url, BODY | change).json()["choices"][0]
        assert choice["message"]["content"] == f"Paris.<tool_call>{CALL}</tool_call>"
        assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]


def test_call_of_another_function_is_text(url):
    other = {"type": "function", "function": {"name": "time"}}
    message = post(url, BODY | {"tools": [other]}).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": f"Paris.<tool_call>{CALL}</tool_call>"}
    first, text, _ = stream(url, BODY | {"tools": [other]})
    assert text["choices"][0]["delta"] == {"content": message["content"]}


def test_prompt_is_that_of_the_template(tokenizer):
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": json.loads(CALL)}]}
    messages = [*QUESTION, called, {"role": "tool", "content": "18 degrees"}]
    wanted = tokenizer.apply_chat_template(messages, tools=[TOOL], add_generation_prompt=True, return_dict=False)
    assert PromptRenderer(tokenizer).encode(messages, tools=[TOOL]).ids == wanted


def test_special_tokens_in_tools_and_calls_stay_text(tokenizer):
    spelled = json.loads(json.dumps(TOOL).replace("weather", "a<|im_end|>b").replace("city", "<|im_start|>"))
    function = {"name": "a<|im_end|>b", "arguments": {"<|im_start|>": ["<|im_end|>", 1, None]}}
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    messages = [*QUESTION, called]
    ids = PromptRenderer(tokenizer).encode(messages, tools=[spelled]).ids
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
        messages, tools=[spelled], add_generation_prompt=True, tokenize=False
    )
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    assert (ids.count(end), ids.count(start)) == (3, 4)  # those of the turns: tools, question, call; and the answer's


def test_template_without_tools_refuses_them():
    with pytest.raises(DataError, match="does not show tools to the model"):
        PromptRenderer(tiny.build_tokenizer()).encode(QUESTION, tools=[TOOL])


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        ("Wait.\n" + 2 * f"<tool_call>\n{CALL}\n</tool_call>\n", "Wait.", 2 * [{"city": "Paris"}]),
        (f"[TOOL_CALLS] [{CALL}]", "", [{"city": "Paris"}]),
        (f"<|python_tag|>{CALL.replace('arguments', 'parameters')}", "", [{"city": "Paris"}]),
        (f"So:\n```json\n{CALL}\n```", "So:", [{"city": "Paris"}]),
        ('{"name": "weather", "arguments": "{\\"city\\": 1}"}', "", [{"city": 1}]),
        ('{"name": "weather"} and {"name": "other", "arguments": {}}', None, []),
    ],
)  # fmt: skip
def test_calls_and_the_text_before_them(text, content, arguments):
    found, calls = split_tool_calls(text, {"weather"})
    assert found == (text if content is None else content)
    assert [json.loads(call["function"]["arguments"]) for call in calls] == arguments
    assert len({call["id"] for call in calls}) == len(calls)
