"""data.thinking_mix: a seeded fraction keeps its reasoning; the thinking switch says which, as at inference."""

import pytest

from sft_recipe.config.validation import build_config
from sft_recipe.data.messages import Conversation, Message
from sft_recipe.data.preview.compute import compute_preview
from sft_recipe.data.rendering.renderer import Renderer, RenderOptions
from sft_recipe.data.rendering.thinking_mix import mix_notice
from sft_recipe.data.run_inputs import prepare, store_options
from sft_recipe.errors import ConfigError
from tests.data.rendering.oracles import TOKENIZERS, own_ids, truth
from tests.data.stores import write
from tests.support import tiny

NAME, KIND = "qwen3", "bytes"
TOKENIZER = TOKENIZERS[NAME, KIND]


def talk(number, inline=False, **answer):
    content = f"<think>\nBecause {number}.\n</think>\n\nYes {number}." if inline else f"Yes {number}."
    reasoning = "" if inline else f"Because {number}."
    message = Message("assistant", **{"content": content, "reasoning": reasoning} | answer)
    return Conversation((Message("user", f"Is it {number}?"), message))


def plain(number):
    return talk(number, reasoning="")


def encode(conversations, share, seed=0):
    return Renderer(TOKENIZER, options=RenderOptions(thinking_mix=share, seed=seed)).encode_batch(conversations)


def forms(number):
    """The ids and mask of a record with and without its reasoning."""
    result = []
    for conversation, switch in ((talk(number), True), (plain(number), False)):
        ids = own_ids(TOKENIZER, conversation, enable_thinking=switch)
        result.append((ids, truth(NAME, KIND, ids, conversation, enable_thinking=switch)))
    return result


def kept(share, seed=0, count=300):
    found = encode([talk(number) for number in range(count)], share, seed)
    return {number for number, encoded in enumerate(found) if encoded.input_ids == forms(number)[0][0]}


@pytest.mark.parametrize("inline", [False, True])
def test_each_record_is_one_of_its_two_forms_as_at_inference(inline):
    found = encode([talk(number, inline) for number in range(40)], 0.5)
    expected = [forms(number) for number in range(40)]
    which = [forms.index((e.input_ids, e.loss_mask)) for e, forms in zip(found, expected, strict=True)]
    assert {0, 1} == set(which)


def test_the_share_is_that_of_the_records_and_grows_by_adding():
    shares = {share: kept(share) for share in (0.0, 0.25, 0.75, 1.0)}
    assert shares[0.0] == set() and shares[1.0] == set(range(300))
    assert shares[0.25] < shares[0.75]
    for share in (0.25, 0.75):  # four standard deviations of a binomial distribution
        assert abs(len(shares[share]) - 300 * share) < 4 * (300 * share * (1 - share)) ** 0.5


def test_the_choice_depends_on_the_seed_and_the_record_alone():
    assert kept(0.5) == kept(0.5) != kept(0.5, seed=1)
    backwards = encode([talk(number) for number in reversed(range(50))], 0.5)
    assert encode([talk(number) for number in range(50)], 0.5) == backwards[::-1]


def test_records_without_reasoning_are_answered_without_thinking():
    [encoded] = encode([plain(3)], 1.0)
    assert (encoded.input_ids, encoded.loss_mask) == forms(3)[1]


@pytest.mark.parametrize("switch", [True, False])
def test_a_record_that_sets_the_switch_is_left_as_it_is(switch):
    conversation = Conversation(talk(1, reasoning="hm").messages, chat_template_kwargs={"enable_thinking": switch})
    results = [encode([conversation], share)[0] for share in (0.0, 1.0)]
    assert results[0] == results[1] == Renderer(TOKENIZER).encode(conversation)


def test_reasoning_without_an_answer_stays():
    [encoded] = encode([talk(1, content="")], 0.0)
    assert encoded == Renderer(TOKENIZER, options=RenderOptions(enable_thinking=True)).encode(talk(1, content=""))


@pytest.mark.parametrize(
    ("share", "template", "is_noticed"),
    [
        (0.5, tiny.CHATML, True),
        (0.5, tiny.CHATML.replace("{% for", "{{ 'Begin by thinking.' }}{% for", 1), True),
        (0.5, TOKENIZER.chat_template, False),
        (0.0, tiny.CHATML, False),
        (1.0, tiny.CHATML, False),
        (None, tiny.CHATML, False),
    ],
)
def test_a_mix_that_the_prompt_does_not_show_is_noticed(share, template, is_noticed):
    notice = mix_notice(share, tiny.build_tokenizer(template))
    assert (notice is not None) is is_noticed
    assert not notice or notice.startswith("data.thinking_mix is 0.5, but the chat template has no thinking switch")


def test_preparation_and_preview_have_the_notice(tmp_path, model_dir):
    path = write(tmp_path / "a.json", [{"prompt": "Hi", "response": "Hello there."}])
    data = {"train_files": str(path), "thinking_mix": 0.5, "cache_dir": str(tmp_path / "cache")}
    groups = {"model": {"path": str(model_dir)}, "data": data, "optim": {}, "fsdp": {}, "lora": {}}
    config = build_config(groups | {"trainer": {"output_dir": str(tmp_path / "run")}})
    for announce in (lambda say: prepare(config, 0, say), lambda say: compute_preview(config, 0, say)):
        notices = []
        announce(notices.append)
        assert any(notice.startswith("data.thinking_mix is 0.5, but") for notice in notices)


def configuration(**data):
    return build_config({"model": {}, "data": data, "optim": {}, "fsdp": {}, "lora": {}, "trainer": {"seed": 7}})


def test_only_a_mix_depends_on_the_seed_of_the_run():
    assert store_options(configuration(thinking_mix=0.5)).render.seed == 7
    assert store_options(configuration()).render == RenderOptions()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"thinking_mix": 1.5}, "data.thinking_mix is 1.5; it should be less than or equal to 1"),
        ({"thinking_mix": 0.5, "enable_thinking": True}, "set only one of enable_thinking, thinking_mix"),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs.enable_thinking: each sets",
        ),
    ],
)
def test_one_key_sets_the_switch(data, expected):
    with pytest.raises(ConfigError, match=expected):
        configuration(**data)
