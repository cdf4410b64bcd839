"""Answers equal those of transformers, end where they should, and become the history of the conversation."""

import json
import math
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_recipe.chat.sampling import Sampling
from sft_recipe.chat.session import Session
from sft_recipe.data.formats import to_conversation
from sft_recipe.errors import ConfigError, DataError, ModelError
from tests.chat.conftest import ANSWER, load
from tests.chat.scripted import build_scripted_model
from tests.support import tiny

QUESTION = "What is the capital of France?"
TAGS = [*tiny.SPECIAL, "<think>", "</think>"]


def generate_with_transformers(folder, messages, **options):
    """The answer by transformers alone: its own template, generation and decoding."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)[0, ids.shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True)


def test_greedy_answers_equal_those_of_transformers_over_several_turns(model_dir):
    session = Session(load(model_dir), Sampling(max_new_tokens=12))
    for question in (QUESTION, "你好，今天天气怎么样？", "1 2 3"):
        asked = [*session.messages, {"role": "user", "content": question}]
        reply = session.ask(question)
        assert reply.content == generate_with_transformers(model_dir, asked, max_new_tokens=12, do_sample=False)
        assert reply.finish_reason == "length" and reply.completion_tokens == 12
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 3


def test_sampled_answers_equal_those_of_transformers(model_dir):
    options = Sampling().updated({"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 3, "max_new_tokens": 12})
    reply = Session(load(model_dir), options).ask(QUESTION)
    torch.manual_seed(3)
    sampled = dict(do_sample=True, temperature=0.7, top_p=0.9, top_k=20, max_new_tokens=12)
    assert reply.content == generate_with_transformers(model_dir, [{"role": "user", "content": QUESTION}], **sampled)


def test_a_temperature_near_0_is_greedy_decoding(model_dir):
    """Logits divided by it would overflow."""
    model = load(model_dir)
    greedy, cold = (
        Session(model, Sampling(temperature, max_new_tokens=12)).ask(QUESTION).content for temperature in (0, 1e-40)
    )
    assert greedy == cold


def test_model_without_stop_tokens_answers_up_to_the_limit(model_dir):
    model = load(model_dir)
    model.stop_token_ids = []
    assert Session(model, Sampling(max_new_tokens=3)).ask(QUESTION).completion_tokens == 3


def test_answer_ends_with_the_stop_token_and_is_streamed(model):
    pieces = []
    reply = Session(model, Sampling()).ask(QUESTION, pieces.append)
    assert (reply.content, reply.reasoning, reply.finish_reason) == (ANSWER, "", "stop")
    assert [piece.text for piece in pieces] == ["Pa", "ris", ",", " the", " capital", " of", " France", "."]
    assert reply.completion_tokens == len(pieces) + 1  # and the stop token


def test_stop_tokens_are_those_of_the_generation_config(scripted, tmp_path):
    """A run's export has there what ended the turns of its data; here it is the comma."""
    folder = shutil.copytree(scripted, tmp_path / "model")
    (comma,) = tiny.build_tokenizer()(",")["input_ids"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [comma, 2]}))
    assert Session(load(folder), Sampling()).ask(QUESTION).content == "Paris"


def test_sampling_defaults_are_those_of_the_generation_config(scripted, tmp_path):
    folder = shutil.copytree(scripted, tmp_path / "model")
    assert load(folder).sampling == Sampling()
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert load(folder).sampling == Sampling(0.6, 0.95, 50, 1.05)  # 50: of transformers, where none is set
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9}))
    assert load(folder).sampling.temperature == 0  # transformers decodes greedily without do_sample


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_computes_nan_does_not_answer(scripted, tmp_path, temperature):
    folder = shutil.copytree(scripted, tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="logits that are NaN"):
        Session(load(folder), Sampling(temperature=temperature)).ask(QUESTION)


def test_stop_strings_end_the_answer(model):
    reply = Session(model, Sampling(stop=("tal of",))).ask(QUESTION)
    assert (reply.content, reply.finish_reason) == ("Paris, the capi", "stop")


def test_reasoning_is_kept_apart_from_the_answer(tmp_path):
    tokenizer = tiny.build_tokenizer(special_tokens=TAGS)
    folder = build_scripted_model(tmp_path / "model", "<think>It is</think>Paris.", tokenizer)
    session = Session(load(folder), Sampling())
    reply = session.ask(QUESTION)
    assert (reply.reasoning, reply.content) == ("It is", "Paris.")
    assert session.messages[-1] == {"role": "assistant", "content": "Paris.", "reasoning_content": "It is"}


def test_cancel_keeps_what_was_answered(model):
    cancel, session = threading.Event(), Session(model, Sampling())
    reply = session.ask(QUESTION, lambda piece: cancel.set() if piece.text == "ris" else None, cancel)
    assert (reply.content, reply.finish_reason) == ("Paris", "canceled")
    assert session.messages[-1]["content"] == "Paris"


def test_retry_replaces_the_answer_with_another_sample(model_dir):
    session = Session(load(model_dir), Sampling(temperature=1.5, seed=1, max_new_tokens=12))
    first = session.ask(QUESTION).content
    second = session.retry().content
    assert first != second and len(session.messages) == 2
    again = Session(load(model_dir), session.sampling)
    assert [again.ask(QUESTION).content, again.retry().content] == [first, second]


def test_system_reset_and_record(model):
    session = Session(model, Sampling())
    session.set_system("Be brief.")
    session.ask(QUESTION)
    record = session.record()
    assert [turn["role"] for turn in record["messages"]] == ["system", "user", "assistant"]
    assert to_conversation(record, "").messages[-1].content == ANSWER  # training reads it
    session.reset()
    assert session.messages == [{"role": "system", "content": "Be brief."}] and session.system == "Be brief."
    session.set_system("")
    assert session.messages == []
    with pytest.raises(DataError, match="no answer to replace"):
        session.retry()


def test_answers_end_with_the_context_and_a_full_one_is_an_error(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    prompt = Session(load(folder), Sampling(max_new_tokens=1)).ask(QUESTION).prompt_tokens
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": prompt + 5}))
    session = Session(load(folder), Sampling(max_new_tokens=100))
    reply = session.ask(QUESTION)
    assert (reply.completion_tokens, reply.finish_reason) == (5, "length")
    before = list(session.messages)
    with pytest.raises(DataError, match=f"the model's context is {prompt + 5}"):
        session.ask(QUESTION)
    assert session.messages == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 1.1}, "from 0 to 1"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number from 0"),
        ({"max_new_tokens": 0}, "from 1"),
        ({"seed": True}, "seed is True"),
        ({"stop": [""]}, "stop is"),
        ({"stop": ["x"] * 17}, "at most 16"),
    ],
)
def test_invalid_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling().updated(options)


def test_restricting_the_tokens_means_sampling():
    assert Sampling().updated({"temperature": 1e-320}).temperature == 0
    assert Sampling().updated({"top_p": 0.9}).temperature == 1
    assert Sampling(temperature=0.7).updated({"top_p": 0.9}).temperature == 0.7
    assert Sampling().updated({"top_p": 1.0, "top_k": 0}).temperature == 0
    assert Sampling().updated({"top_p": 0.9, "temperature": 0.0}).temperature == 0
