"""MiniMind's conversations give its own token ids, and with the template in conf/templates its own labels."""

import json

import pytest
from transformers import AutoTokenizer

from sft_recipe.data.formats import read_conversations
from sft_recipe.data.rendering.renderer import Renderer
from tests.support.runs import ROOT
from tests.support.shared import shared_data

LENGTH = 256  # where MiniMind has cut its rows
MARKED = ROOT / "conf/templates/minimind.jinja"
THOUGHT = [25, 234, 234, 26, 234, 234]  # <think> \n \n </think> \n \n
NEWLINE = 234


@pytest.fixture(scope="module")
def minimind():
    return AutoTokenizer.from_pretrained(shared_data("minimind") / "tokenizer")


def rows(name):
    """Yield each conversation with MiniMind's labels, by its ids."""
    folder = shared_data(name)
    records = map(json.loads, (folder / "tokens.jsonl").read_text().splitlines())
    labels = {tuple(record["input_ids"]): record["labels"] for record in records}
    conversations = list(read_conversations(folder / "conversations.jsonl"))
    assert len(conversations) == len(labels) == 80
    return conversations, labels


@pytest.mark.parametrize("name", ["minimind", "minimind_moe"])
def test_ids_are_those_of_minimind_and_labels_differ_in_thought_and_newline(minimind, name):
    conversations, expected = rows(name)
    renderer = Renderer(minimind)
    for conversation in conversations:
        encoded = renderer.encode(conversation)
        labels = expected[tuple(encoded.input_ids[:LENGTH])]
        pairs = list(zip(encoded.input_ids, encoded.loss_mask, labels, strict=False))
        differing = [token for token, mask, label in pairs if bool(mask) != (label != -100)]
        assert differing in (THOUGHT + [NEWLINE], THOUGHT)  # a row that was cut has no newline
        assert not any(mask for _, mask, label in pairs if label == -100)


@pytest.mark.parametrize("name", ["minimind", "minimind_moe"])
def test_labels_are_those_of_minimind_with_its_marked_template(minimind, name):
    conversations, expected = rows(name)
    renderer = Renderer(minimind, chat_template=MARKED.read_text(encoding="utf-8"))
    for conversation in conversations:
        encoded = renderer.encode(conversation)
        pairs = zip(encoded.input_ids, encoded.loss_mask, strict=True)
        labels = [token if mask else -100 for token, mask in pairs][:LENGTH]
        assert labels == expected[tuple(encoded.input_ids[:LENGTH])]


def test_marks_change_no_text(minimind):
    """Tools, their calls and results, and reasoning, which the conversations above do not have."""
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "I add.", "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "<think>\nSo.\n</think>\n\nTwo."},
    ]
    for messages, schemas in ((turns, tools), (turns[:2], None)):
        for prompt in (False, True):
            texts = [
                minimind.apply_chat_template(
                    messages, schemas, chat_template=template, tokenize=False, add_generation_prompt=prompt
                )
                for template in (None, MARKED.read_text(encoding="utf-8"))
            ]
            assert texts[0] == texts[1]
