"""data.random_system_prompt and data.drop_empty_thoughts: seeded fractions, rendered as the tokenizer itself does."""

from dataclasses import replace

import pytest

from sft_recipe.config.validation import build_config
from sft_recipe.data.messages import Conversation, Message
from sft_recipe.data.rendering.annotate import AnnotatedText
from sft_recipe.data.rendering.draws import SYSTEM_PROMPTS, with_system_prompt, without_empty_thoughts
from sft_recipe.data.rendering.renderer import Renderer, RenderOptions
from sft_recipe.data.run_inputs import store_options
from sft_recipe.errors import ConfigError
from tests.support import tiny

THOUGHT = "<think>\n\n</think>\n\n"
WRITES_THOUGHT = "('<think>\\n\\n</think>\\n\\n' if message['role'] == 'assistant' else '') + message['content'] +"
WITH_THOUGHTS = tiny.CHATML.replace("message['content'] +", WRITES_THOUGHT)
COUNT = 300


def talk(number, *before):
    turns = Message("user", f"Is it {number}?"), Message("assistant", f"Yes {number}.")
    return Conversation((*before, *turns, *turns))


TALKS = [talk(number) for number in range(COUNT)]


def encode(conversations, template=WITH_THOUGHTS, **options):
    return Renderer(tiny.build_tokenizer(template), options=RenderOptions(**options)).encode_batch(conversations)


def near(found, share):
    """Within four standard deviations of a binomial distribution."""
    return abs(found - COUNT * share) < 4 * (COUNT * share * (1 - share)) ** 0.5


# Empty thoughts


def dropped(share, seed, talks=TALKS):
    """The numbers of the conversations without thoughts; each has all or none of them."""
    found = encode(talks, drop_empty_thoughts=share, seed=seed)
    forms = zip(encode(talks), encode(talks, tiny.CHATML), strict=True)
    places = [[given, plain].index(each) for each, (given, plain) in zip(found, forms, strict=True)]
    return {number for number, place in enumerate(places) if place}


def test_fraction_is_that_of_the_conversations_and_grows_by_adding():
    few, many = dropped(0.3, seed=1), dropped(0.8, seed=1)
    assert near(len(few), 0.3) and near(len(many), 0.8) and few < many
    assert (dropped(0.0, seed=1), dropped(1.0, seed=1)) == (set(), set(range(COUNT)))


def test_choice_depends_on_seed_and_conversation_alone():
    assert dropped(0.5, seed=1) == dropped(0.5, seed=1) != dropped(0.5, seed=2)
    assert {COUNT - 1 - number for number in dropped(0.5, seed=1, talks=TALKS[::-1])} == dropped(0.5, seed=1)


@pytest.mark.parametrize(
    ("marked", "expected"),
    [
        (f"a [{THOUGHT}b] c", "a [b] c"),
        (f"a {THOUGHT}[b] c", "a [b] c"),
        (f"[a{THOUGHT}] b{THOUGHT} [c]", "[a] b [c]"),
        (f"{THOUGHT}{THOUGHT}[a]", "[a]"),
        ("<think>\nx\n</think>\n\n[a]", "<think>\nx\n</think>\n\n[a]"),
    ],
)
def test_spans_move_with_their_text(marked, expected):
    def parsed(text):
        plain = text.replace("[", "").replace("]", "")
        edges = [i - n for n, i in enumerate(i for i, character in enumerate(text) if character in "[]")]
        return AnnotatedText(plain, list(zip(edges[::2], edges[1::2], strict=True)))

    assert without_empty_thoughts(parsed(marked)) == parsed(expected)


# System prompts


def test_system_prompts_are_drawn_evenly_and_rendered_as_given_ones():
    added = [with_system_prompt(conversation, 0.5, 3) for conversation in TALKS]
    prompts = [each.messages[0].content for each in added if each.messages[0].role == "system"]
    assert near(len(prompts), 0.5) and set(prompts) == set(SYSTEM_PROMPTS)
    assert encode(TALKS, random_system_prompt=0.5, seed=3) == encode(added)
    assert [each for each in added if each.messages[0].role != "system"] == [
        conversation for conversation, each in zip(TALKS, added, strict=True) if each.messages[0].role != "system"
    ]


def test_conversations_with_a_system_turn_or_tools_stay():
    tools = ({"type": "function", "function": {"name": "f"}},)
    for conversation in (talk(1, Message("system", "")), replace(talk(1), tools=tools)):
        assert with_system_prompt(conversation, 1.0, 0) is conversation


def test_both_choices_are_independent():
    found = encode(TALKS, random_system_prompt=0.5, drop_empty_thoughts=0.5)
    prompted = [with_system_prompt(conversation, 0.5, 0) for conversation in TALKS]
    both = sum(each == form for each, form in zip(found, encode(prompted, tiny.CHATML), strict=True))
    assert near(both, 0.5)
    kinds = [conversation.messages[0].role for conversation in prompted]
    dropped = [each == form for each, form in zip(found, encode(prompted, tiny.CHATML), strict=True)]
    assert near(sum(drop and kind == "system" for drop, kind in zip(dropped, kinds, strict=True)), 0.25)


# Keys


def configuration(**data):
    return build_config({"model": {}, "data": data, "optim": {}, "fsdp": {}, "lora": {}, "trainer": {"seed": 7}})


@pytest.mark.parametrize("key", ["random_system_prompt", "drop_empty_thoughts"])
def test_keys_arrive_with_the_seed_of_the_run(key):
    render = store_options(configuration(**{key: 0.5})).render
    assert (getattr(render, key), render.seed) == (0.5, 7)
    assert store_options(configuration()).render == RenderOptions()
    for value in (-0.1, 1.1, "often"):
        with pytest.raises(ConfigError, match=f"data.{key}"):
            configuration(**{key: value})
