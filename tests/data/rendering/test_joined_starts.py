"""Answers whose first token also has the end of the prompt in it: no loss on that token, and they are counted."""

import pytest
from tokenizers import pre_tokenizers

from sft_recipe.config.schema import DataConfig
from sft_recipe.data.messages import Message
from sft_recipe.data.notices import data_notices
from sft_recipe.data.preview.html import page
from sft_recipe.data.preview.terminal import summary
from sft_recipe.data.rendering.renderer import Renderer, RenderOptions
from sft_recipe.data.rendering.text_tokens import ByteTokens
from tests.data.preview.examples import stats_of
from tests.data.rendering.random_conversations import chat
from tests.data.rendering.styles import own_ids, trained
from tests.data.stores import build, write
from tests.support import tiny

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + '\n' }}{% else %}"
    "{{ HEADER }}{% generation %}{{ m.content + '</s>' }}{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}"
    "{{ HEADER if add_generation_prompt }}"
)
TAGS = ("{% generation %}", "{% endgeneration %}")
ANSWERS = ["Paris.", "fine", "\nParis.", " Paris.", "2"]
WHOLE = [f"{answer}</s>" for answer in ANSWERS]


def template_of(header, keep_tags=False):
    template = TEMPLATE.replace("HEADER", repr(header))
    return template if keep_tags else template.replace(TAGS[0], "").replace(TAGS[1], "")


def tokenizer_of(header, **kwargs):
    return tiny.build_tokenizer(template_of(header, **kwargs), ["<unk>", "</s>"], "</s>")


def conversation_of(*answers, question="Capital of France?"):
    return chat(*(turn for answer in answers for turn in (Message("user", question), Message("assistant", answer))))


@pytest.mark.parametrize("has_offsets", [False, True])
@pytest.mark.parametrize(
    ("header", "expected", "joined"),
    [
        # " Paris", " fine" and " 2" are tokens; before white space the space of the prompt is one token
        ("ASSISTANT: ", [".</s>", "</s>", "\nParis.</s>", " Paris.</s>", "</s>"], 3),
        ("ASSISTANT:\n", WHOLE, 0),
        ("ASSISTANT:", WHOLE, 0),
    ],
)
def test_answers_in_one_token_with_the_end_of_the_prompt_are_counted(header, expected, joined, has_offsets):
    tokenizer, conversation = tokenizer_of(header), conversation_of(*ANSWERS)
    if has_offsets:  # the tokenizer changes the text, so that its offsets locate the tokens
        core = tokenizer.backend_tokenizer
        core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\t", "removed"), core.pre_tokenizer])
        conversation = conversation_of(*ANSWERS, question="Capital\tof France?")
    encoded = Renderer(tokenizer).encode(conversation)
    assert encoded.input_ids == own_ids(tokenizer, conversation)
    assert trained(tokenizer, encoded) == expected
    assert encoded.joined_starts == joined


def test_only_answers_that_are_trained_on_count():
    conversation = conversation_of("Paris.", "fine")
    renderer = Renderer(tokenizer_of("ASSISTANT: "), options=RenderOptions(train_on="last"))
    assert renderer.encode(conversation).joined_starts == 1


def test_generation_tags_train_the_token_as_in_transformers():
    tokenizer = tokenizer_of("ASSISTANT: ", keep_tags=True)
    encoded = Renderer(tokenizer).encode(conversation_of("Paris."))
    assert trained(tokenizer, encoded) == [" Paris.</s>"] and encoded.joined_starts == 0


@pytest.mark.parametrize(
    ("pieces", "is_visible"),
    [([b" ", "你".encode()], False), ([b" \xe4\xbd", b"\xa0"], True), ([" 你".encode()], True), ([b" "], False)],
)
def test_part_of_a_character_counts_as_visible(pieces, is_visible):
    tokens = ByteTokens(" 你" if len(pieces) > 1 or is_visible else " ", list(range(len(pieces))), pieces)
    assert bool(tokens.text_before(tokens.first_token_from(1), 1).strip()) == is_visible


@pytest.mark.parametrize(("header", "joined"), [("ASSISTANT: ", 3), ("ASSISTANT:", 0)])
def test_training_and_preview_say_how_many_answers_begin_in_the_prompt(header, joined, tmp_path):
    tokenizer = tokenizer_of(header)
    records = [{"prompt": "Capital?", "response": answer} for answer in ANSWERS]
    path = write(tmp_path / "a.json", records)
    report = build(path, tokenizer, tmp_path / "cache", workers=2).report
    assert report.joined_starts == joined
    notices = data_notices(report, "train", DataConfig(train_files=[str(path)]), tmp_path)
    renderer = Renderer(tokenizer)
    stats = stats_of([conversation_of(answer) for answer in ANSWERS], renderer)
    shown = "\n".join(summary(stats))
    html = page(stats, renderer, "a", "b")
    if not joined:
        assert not notices and "first token" not in shown and "first token" not in html
        return
    [notice] = notices
    assert notice.startswith("train: 3 answers whose first token") and "does not end in a space" in notice
    assert "3 answers whose first token" in shown and "3 answers whose first token" in html
