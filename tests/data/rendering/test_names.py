"""Names of speakers reach the template; where it does not show them, they are counted as not read."""

import json

import pytest

from sft_recipe.data.formats import to_conversation
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.errors import DataError
from tests.data.rendering.oracles import own_ids
from tests.data.stores import build, examples, write
from tests.support import tiny

NAMED = tiny.CHATML.replace("message['role'] +", "(message.name or message['role']) +")
TURNS = [
    ("user", "Ann", "Hi"),
    ("assistant", "", "Hello Ann."),
    ("user", "Bo", "And me?"),
    ("assistant", "", "Hello Bo."),
]


def record(turns=TURNS):
    return {"messages": [{"role": role, "content": text, "name": name or None} for role, name, text in turns]}


def test_a_template_that_shows_names_gets_them(tmp_path, cache_dir):
    tokenizer = tiny.build_tokenizer(NAMED)
    conversation = to_conversation(record(), "")
    encoded = Renderer(tokenizer).encode(conversation)
    assert encoded.input_ids == own_ids(tokenizer, conversation) and not encoded.omits_names
    text = tokenizer.decode(encoded.input_ids)
    assert "<|im_start|>Ann\nHi" in text and "<|im_start|>Bo\nAnd" in text and "<|im_start|>assistant\n" in text
    supervised = [t for t, bit in zip(encoded.input_ids, encoded.loss_mask, strict=True) if bit]
    assert tokenizer.decode(supervised) == "Hello Ann.<|im_end|>Hello Bo.<|im_end|>"
    store = build(write(tmp_path / "a.json", [record()]), tokenizer, cache_dir)
    assert examples(store)[0][0] == encoded.input_ids and store.report.remarks.unread == {}


def test_names_that_the_template_does_not_show_are_counted(tmp_path, cache_dir, tokenizer):
    records = [record(), {"prompt": "a", "response": "b"}, record()]
    store = build(write(tmp_path / "a.json", records), tokenizer, cache_dir)
    assert list(store.report.remarks.sentences()) == ["keys that are not read: the name of a turn (2 records)"]
    without = [{**turn, "name": None} for turn in record()["messages"]]
    plain = build(write(tmp_path / "b.json", [{"messages": without}]), tokenizer, cache_dir)
    assert examples(plain)[0] == examples(store)[0]


def test_an_answer_of_another_name_than_the_generation_prompt_is_an_error():
    turns = [("user", "", "Hi"), ("assistant", "Eve", "Hello.")]
    with pytest.raises(DataError, match="has the generation prompt"):
        Renderer(tiny.build_tokenizer(NAMED)).encode(to_conversation(record(turns), ""))


def test_a_name_that_spells_a_special_token_stays_text():
    tokenizer = tiny.build_tokenizer(NAMED)
    turns = [("user", "<|im_end|>", "Hi"), ("assistant", "", "Hello.")]
    encoded = Renderer(tokenizer).encode(to_conversation(json.loads(json.dumps(record(turns))), ""))
    assert encoded.has_special_text and encoded.input_ids.count(tokenizer.eos_token_id) == 2
