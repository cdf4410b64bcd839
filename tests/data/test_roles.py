"""Names of roles: common ones are known in any letter case, data.roles names others, and unknown ones are errors."""

import json

import pytest

from sft_recipe.config.schema import Config
from sft_recipe.config.validation import build_config
from sft_recipe.data.columns import Columns
from sft_recipe.data.pipeline import read_data
from sft_recipe.errors import ConfigError, DataError
from tests.data.files import write

NAMES = {
    "system": ["system", "developer", "System"],
    "user": ["user", "human", "Human", "USER", "prompter"],
    "assistant": ["assistant", "gpt", "GPT", "chatgpt", "model", "bot", "AI", "ai", "chatbot", "bing", "bard"],
    "tool": ["tool", "function", "observation", "ipython", "tool_response", "tool_result", "function_response"],
}
CALL = '{"name": "f", "arguments": {"a": 1}}'


def read(tmp_path, record, roles=None, columns=None):
    (item,) = read_data(write(tmp_path / "a.json", [record]), columns=Columns(columns, roles))
    return item


def roles_of(conversation):
    return [message.role for message in conversation.messages]


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in NAMES.items() for name in names])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_common_names_are_known(tmp_path, role, name, keys):
    turns = [("user", "a"), ("assistant", "b")]
    turns = [(name, "x"), *turns] if role == "system" else [*turns, (name, "x"), ("assistant", "c")]
    found = roles_of(read(tmp_path, {"messages": [dict(zip(keys, turn, strict=True)) for turn in turns]}))
    assert found[0 if role == "system" else 2] == role


@pytest.mark.parametrize("name", ["function_call", "tool_call", "Function_Call"])
def test_names_of_calls_in_any_letter_case(tmp_path, name):
    item = read(tmp_path, {"conversations": [{"from": "human", "value": "a"}, {"from": name, "value": CALL}]})
    assert item.messages[1].tool_calls[0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert item.unread == ()


@pytest.mark.parametrize("as_json", [False, True])
def test_names_of_the_data_are_mapped_once(tmp_path, as_json):
    turns = [("model", "a"), ("Agent", "b"), ("Sandbox", "c"), ("user", "d")]
    turns = [{"role": role, "content": text} for role, text in turns]
    roles = {"model": "user", "Agent": "assistant", "Sandbox": "tool", "user": "assistant", "Unused": "user"}
    item = read(tmp_path, {"messages": json.dumps(turns) if as_json else turns}, roles)
    assert roles_of(item) == ["user", "assistant", "tool", "assistant"]


def test_a_mapped_name_of_calls_and_a_single_turn(tmp_path):
    turn = {"speaker": "Action", "content": CALL}
    item = read(tmp_path, {"prompt": "a", "response": turn}, {"Action": "function_call"}, {"role": "speaker"})
    assert item.messages[1].tool_calls[0]["function"]["name"] == "f"


def test_a_text_that_is_json_stays_text_beside_other_names(tmp_path):
    item = read(tmp_path, {"prompt": "[1, 2]", "answer": '["b"]'}, {"Agent": "assistant"}, {"response": "answer"})
    assert [message.content for message in item.messages] == ["[1, 2]", '["b"]']


def test_unknown_name_is_an_error_that_names_the_key(tmp_path):
    item = read(tmp_path, {"messages": [{"role": "Agent", "content": "a"}]}, {"agent": "user"})
    assert isinstance(item.error, DataError)
    assert "messages[0].role is 'Agent'; expected system, user, assistant or tool; data.roles maps" in str(item.error)


def test_configuration_accepts_only_roles():
    with pytest.raises(ConfigError, match=r"data.roles.Agent is 'robot'; it must be one of system, user, assistant"):
        build_config({"model": {}, "data": {"roles": {"Agent": "robot"}}, "optim": {}, "fsdp": {}, "lora": {}})
    tree = {"model": {}, "data": {"roles": {"Agent": "assistant"}}, "optim": {}, "fsdp": {}, "lora": {}}
    assert isinstance(build_config(tree), Config)
