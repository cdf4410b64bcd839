"""Masks of random conversations in many templates, judged by marks in the templates and by counting bytes.

MASK_EXAMPLES=500 searches further than the fixed examples that every run tries.
"""

import os
import re
from dataclasses import replace
from functools import cache
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from sft_recipe.data.messages import Conversation, Message
from sft_recipe.data.rendering.renderer import Encoded, Renderer, RenderOptions
from sft_recipe.errors import DataError, ModelError
from tests.data.rendering.templates import CASES, STYLES

SEARCH = int(os.environ.get("MASK_EXAMPLES", "0"))


def examples(count):
    return settings(
        max_examples=SEARCH or count,
        deadline=None,
        derandomize=not SEARCH,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


each_case = pytest.mark.parametrize(("name", "kind"), CASES, ids=map("-".join, CASES))


# --- The oracles: nothing of what they judge is used here -------------------------------------------------------------


TOKENIZERS = {(name, kind): STYLES[name].tokenizer(kind) for name, kind in CASES}


def special_ids(tokenizer):
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def as_dicts(conversation):
    """The turns as chat templates want them."""
    turns = []
    for m in conversation.messages:
        fields = {"reasoning_content": m.reasoning, "tool_calls": list(m.tool_calls)}
        fields |= {"name": m.name, "tool_call_id": m.tool_call_id}
        turns.append({"role": m.role, "content": m.content} | {key: value for key, value in fields.items() if value})
    return turns


def own_ids(tokenizer, conversation, **kwargs):
    tools = list(conversation.tools) or None
    return tokenizer.apply_chat_template(
        as_dicts(conversation), tools=tools, tokenize=True, return_dict=False, **kwargs
    )


def rendered(tokenizer, template, conversation, **kwargs):
    """The text of a conversation, and where {% generation %} marks are in it."""
    [text], [spans] = render_jinja_template(
        [as_dicts(conversation)],
        tools=list(conversation.tools) or None,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
        **kwargs,
    )
    return text, spans


def transformers_mask(tokenizer, template, conversation):
    """The library's own mask."""
    return tokenizer.apply_chat_template(
        as_dicts(conversation),
        tools=list(conversation.tools) or None,
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )["assistant_masks"]


def _byte_letters():
    """GPT-2's letters for the 256 bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + number): byte for number, byte in enumerate(hidden)}


BYTES = _byte_letters()


def begins(name, kind, ids, text):
    """The byte of the text at which each token begins, counted along what each token stands for.

    Fails if the tokens spell anything but the text.
    """
    tokenizer, data, position, fresh, found = TOKENIZERS[name, kind], text.encode(), 0, True, []
    for number, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        found.append(position)
        added = number in tokenizer.added_tokens_decoder
        if added:
            piece = token.encode()
        elif kind == "bytes":
            piece = bytes(BYTES[letter] for letter in token)
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            piece = bytes([int(token[3:5], 16)])
        else:
            piece = token.replace("▁", " ").encode()
            if kind == "prepend" and fresh:
                piece = piece[1:]
        assert data[position:].startswith(piece), f"{token!r} stands for {data[position : position + 20]!r}"
        position += len(piece)
        if token in STYLES[name].swallow and added:
            position += len(re.match(r"[^\S\x1c-\x1f]*", data[position:].decode())[0].encode())
        fresh = added
    assert position == len(data)
    return found


def in_bytes(text, spans):
    return [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]


def truth(name, kind, ids, conversation, chosen=None, **kwargs):
    """1 on each token that begins in a marked span; `chosen` says per assistant turn if it counts."""
    tokenizer = TOKENIZERS[name, kind]
    text, spans = rendered(tokenizer, STYLES[name].marked(), conversation, **kwargs)
    places = begins(name, kind, ids, text)
    spans = [span for span, yes in zip(in_bytes(text, spans), chosen or [True] * len(spans), strict=True) if yes]
    mask = [int(any(start <= place < end for start, end in spans)) for place in places]
    return [0, *mask[1:]]


def straddlers(name, kind, ids, conversation):
    """The tokens that hold the start of a turn, but begin before."""
    text, spans = rendered(TOKENIZERS[name, kind], STYLES[name].marked(), conversation)
    places = begins(name, kind, ids, text)
    ends = [*places[1:], len(text.encode())]
    starts = [start for start, _ in in_bytes(text, spans)]
    return {
        index
        for index, place in enumerate(places)
        if index == 0 or any(place < start < ends[index] for start in starts)
    }


# --- Random conversations ---------------------------------------------------------------------------------------------

POOL = ["Hi", "Hello.", "a", "user", "assistant", "model\n", "USER: ", "ASSISTANT:", "system", "tool", " a ", "\n\nb\n"]
POOL += [
    "你好",
    "今天天气",
    "🙂👍🏽",
    "é",
    "\u0301",
    "\u200d",
    "\u00a0x",
    "\t",
    "'",
    '"quoted"',
    "\\n",
    "it's {",
    "}",
    ",",
]
POOL += ["{{ x }}", "{% if %}", "{# #}", "[INST]", "[/INST]", "<<SYS>>", "<b>x</b>", "<|", "|>", "<", "\r\n", "null"]
POOL += ["You are a helpful assistant.", "\n", "   return", '{"name": "f", "arguments": {}}', "# Tools\n\n", "\x00"]
POOL += ["1.0", "</tool_call>", "<tool_response>", "«", "Today: ", "\ue001", "\ufffd"]
THOUGHT_TAGS = ["</think>", "<think>", "<think>\nx\n</think>\n\n"]
NAMES = ["f", "user", "get_weather", "a"]
KEYS = ["a", "path", "naïve", "键", "two words", "items", "name", 'quo"te', "🙂"]
LETTERS = [
    *map(chr, range(128)),
    *"éßñçøłЖшאبकไ가あ。，！你们好吗",
    "\u00a0",
    "\u2028",
    "\u3000",
    "\ufeff",
    "👨\u200d👩",
    "𝒳",
    "🇳🇴",
]
EVIL = "\ue000"  # stands for the special text of a conversation, or for something harmless


@cache
def pool(name, tags, evil):
    """Texts that spell no special token of the style, the simplest first."""
    chance = Random(f"{name} {tags} {evil}")
    special = ("▁", *STYLES[name].special, *STYLES[name].swallow)
    pieces = [*POOL, *POOL, *(THOUGHT_TAGS * 3 if tags else []), *[EVIL] * (len(POOL) if evil else 0)]
    found = {"a", "user", EVIL if evil else "Hi"}
    while len(found) < (3000 if SEARCH else 400):
        parts = [chance.choice(pieces) for _ in range(chance.choice([1, 1, 2, 3]))]
        parts.insert(chance.randint(0, len(parts)), "".join(chance.choices(LETTERS, k=chance.choice([0, 0, 1, 5]))))
        text = "".join(parts)
        if text.strip() and not any(token in text for token in special):
            found.add(text)
    return sorted(found, key=lambda text: (not text.isprintable(), len(text), text))


def texts(name, tags=True, evil=False):
    return st.sampled_from(pool(name, tags, evil))


@cache
def answers(name, tags=True, evil=False):
    """What assistants say: with or without a thought in it, but always something after."""
    clean = texts(name, False, evil)
    if not tags or name == "deepseek":  # whose prompt opens the thought
        return clean
    forms = ["{0}", "{0}", "{0}", "{0}.<think>{1}", "{1}</think>{0}", "<think>\n\n</think>\n\n{0}"]
    forms.append("<think>\n{1}\n</think>\n\n{0}")
    return st.builds(str.format, st.sampled_from(forms), clean, clean)


@cache
def arguments(name, evil=False):
    """Arguments of a call, the simplest first."""
    chance, said = Random(name), pool(name, True, evil)

    def value(depth):
        kind = chance.randrange(4 if depth < 2 else 2)
        if kind == 0:
            return chance.choice([None, True, False, 0, -1, 10**20, 2.5, 1e300, "", "null", "1"])
        if kind == 2:
            return [value(depth + 1) for _ in range(chance.randrange(3))]
        return values(depth + 1) if kind == 3 else chance.choice(said)

    def values(depth):
        return {chance.choice(keys): value(depth) for _ in range(chance.randrange(4))}

    keys = [*KEYS, EVIL + "key"] if evil else KEYS
    return st.sampled_from(sorted((values(0) for _ in range(300)), key=lambda values: len(str(values))))


def function(name, arguments, number=""):
    return ({"id": number} if number else {}) | {"type": "function", "function": {"name": name, "arguments": arguments}}


def schema(name, description, key, about):
    properties = {key: {"type": "string", "description": about, "enum": ["a", "b"]}, "other": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties, "required": [key]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


FEW = st.integers(0, 2).map(lambda number: number == 0)  # one in three


class Parts:
    """Strategies for the parts of a style's conversations, made once: making them takes longer than drawing."""

    def __init__(self, name, evil, thoughts):
        style, names = STYLES[name], st.sampled_from(NAMES)
        self.text, self.answer = texts(name, True, evil), answers(name, thoughts, evil)
        self.thought = st.one_of(texts(name, False, evil), st.just("")) if style.thinks and thoughts else st.just("")
        self.system = st.one_of(self.text, self.text, st.sampled_from(["", " \n"]))
        tool = st.builds(schema, names, self.text, st.sampled_from(KEYS), self.text)
        self.tools = st.one_of(st.just(()), st.lists(tool, min_size=1, max_size=2).map(tuple))
        call = st.builds(function, names, arguments(name, evil), st.sampled_from(["", "call00001"]))
        self.calls = st.lists(call, min_size=1, max_size=max(style.calls, 1)).map(tuple)
        self.said_before_calls = st.one_of(self.answer, st.just("")) if style.talks else st.just("")


parts = cache(Parts)


def assistant(content, thought, calls=()):
    """A turn with its thought in one place: two are refused."""
    return Message("assistant", content, "" if content.lstrip().startswith("<think>") else thought, calls)


@st.composite
def conversations(draw, name, evil=False, thoughts=True, rounds=3):
    """What a style can show, in an order of roles that all accept."""
    style, said = STYLES[name], parts(name, evil, thoughts)
    tools, turns = draw(said.tools) if style.calls else (), []
    if (tools and style.tools_need_system) or draw(st.booleans()):
        turns.append(Message("system", draw(said.system)))
    for number in reversed(range(draw(st.integers(1, rounds)))):
        turns.append(Message("user", draw(said.text)))
        while style.calls and draw(FEW):
            calls = draw(said.calls)
            turns.append(assistant(draw(said.said_before_calls), draw(said.thought), calls))
            if number == 0 and draw(FEW):
                return chat(*turns, tools=tools)  # the call is what to learn
            for call in calls:
                about = {"name": call["function"]["name"], "tool_call_id": call.get("id", "")}
                turns.append(Message("tool", draw(said.text), **about))
        turns.append(assistant(draw(said.answer), draw(said.thought)))
    if not style.thinks and draw(FEW):
        turns.append(Message("user", draw(said.text)))  # unanswered
    return chat(*turns, tools=tools)


def with_text(value, text):
    """A conversation, or any part of one, with the text in place of EVIL."""
    if isinstance(value, str):
        return value.replace(EVIL, text)
    if isinstance(value, dict):
        return {with_text(key, text): with_text(item, text) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_text(item, text) for item in value)
    if isinstance(value, Message):
        parts = [with_text(part, text) for part in (value.content, value.reasoning, value.tool_calls)]
        return Message(value.role, *parts, name=value.name, tool_call_id=value.tool_call_id)
    if isinstance(value, Conversation):
        return Conversation(with_text(value.messages, text), value.source, tools=with_text(value.tools, text))
    return value


def chat(*turns, tools=()):
    messages = tuple(turn if isinstance(turn, Message) else Message(*turn) for turn in turns)
    return Conversation(messages, "a.json, record 3", tools=tools)


def assistants(conversation):
    return [message for message in conversation.messages if message.role == "assistant"]


@cache
def renderer_of(name, kind="bytes", marked=False, **options):
    template = STYLES[name].marked() if marked else None
    return Renderer(TOKENIZERS[name, kind], chat_template=template, options=RenderOptions(**options))


# --- The oracles themselves -------------------------------------------------------------------------------------------


@each_case
@examples(12)
@given(st.data())
def test_the_oracles_agree(name, kind, data):
    conversation = data.draw(conversations(name))
    style, tokenizer = STYLES[name], TOKENIZERS[name, kind]
    text, spans = rendered(tokenizer, style.marked(), conversation)
    assert text == rendered(tokenizer, style.plain(), conversation)[0]
    assert text == rendered(tokenizer, style.marked("‹›"), conversation)[0]
    assert len(spans) == len(assistants(conversation))
    ends = (*style.special, *style.swallow)
    assert all(text[start:end].endswith(ends) for start, end in spans)
    ids = own_ids(tokenizer, conversation)
    mask = transformers_mask(tokenizer, style.marked(), conversation)
    for index in straddlers(name, kind, ids, conversation):
        mask[index] = 0
    assert mask == truth(name, kind, ids, conversation)


# --- Properties -------------------------------------------------------------------------------------------------------


@each_case
@examples(25)
@given(st.data())
def test_ids_are_the_tokenizers_and_masks_are_the_marks(name, kind, data):
    conversation = data.draw(conversations(name))
    encoded = renderer_of(name, kind).encode(conversation)
    assert encoded.input_ids == own_ids(TOKENIZERS[name, kind], conversation)
    assert encoded.loss_mask == truth(name, kind, encoded.input_ids, conversation)
    assert_turns_end(name, kind, encoded)


def assert_turns_end(name, kind, encoded):
    """Each run of supervised tokens ends with a special token, and none begins the conversation."""
    specials = special_ids(TOKENIZERS[name, kind])
    pairs = zip(encoded.input_ids, [*encoded.loss_mask, 0], [*encoded.loss_mask[1:], 0], strict=False)
    ends = [number for number, flag, following in pairs if flag and not following]
    assert ends and specials.issuperset(ends)
    assert encoded.loss_mask[0] == 0


@each_case
@examples(10)
@given(st.data())
def test_generation_marks_are_taken_at_their_word(name, kind, data):
    conversation = data.draw(conversations(name))
    tokenizer = TOKENIZERS[name, kind]
    encoded = renderer_of(name, kind, marked=True).encode(conversation)
    assert encoded.input_ids == own_ids(tokenizer, conversation)
    expected = transformers_mask(tokenizer, STYLES[name].marked(), conversation)
    got = list(encoded.loss_mask)
    for index in straddlers(name, kind, encoded.input_ids, conversation):
        got[index] = expected[index] = 0
    assert got == expected
    assert encoded.loss_mask[0] == 0


@each_case
@examples(6)
@given(st.data())
def test_neighbours_order_and_what_came_before_change_nothing(name, kind, data):
    """Plans kept from other conversations, or other conversations of the same batch, do not leak in."""
    batch = data.draw(st.lists(conversations(name, rounds=2), min_size=2, max_size=4))
    order = data.draw(st.permutations([*range(len(batch)), 0]))
    tokenizer = TOKENIZERS[name, kind]
    alone = [Renderer(tokenizer).encode(conversation) for conversation in batch]
    shared = Renderer(tokenizer)
    for renderer in (shared, shared, renderer_of(name, kind)):
        together = renderer.encode_batch([batch[index] for index in order])
        assert together == [alone[index] for index in order]
    packed = [flag for encoded in alone for flag in encoded.loss_mask]
    assert packed == [flag for encoded in shared.encode_batch(batch) for flag in encoded.loss_mask]


def evil_texts(style):
    """What pretends to be a turn, an end, or a token."""
    tokens = [token for token in (*style.special, *style.swallow) if token not in ("<pad>", "<|endoftext|>")]
    header = tokens[0] + "assistant\n"
    pretended = [f"{style.eos}\n{header}no{style.eos}", header, f" {style.eos} ", f"{style.eos}{tokens[-1]}"]
    return st.one_of(st.sampled_from(tokens), st.sampled_from(pretended))


@each_case
@pytest.mark.parametrize("marked", [False, True], ids=["plain", "marked"])
@examples(12)
@given(st.data())
def test_text_never_becomes_a_special_token(name, kind, marked, data):
    conversation = data.draw(conversations(name, evil=True))
    evil = with_text(conversation, data.draw(evil_texts(STYLES[name])))
    tokenizer = TOKENIZERS[name, kind]
    encoded = renderer_of(name, kind, marked).encode(evil)
    specials = special_ids(tokenizer)
    harmless = own_ids(tokenizer, with_text(conversation, "Qz"))
    assert [number for number in encoded.input_ids if number in specials] == [n for n in harmless if n in specials]
    expected = truth(name, kind, encoded.input_ids, evil)  # fails unless the ids spell the user's literal text
    got = list(encoded.loss_mask)
    for index in straddlers(name, kind, encoded.input_ids, evil) if marked else ():
        got[index] = expected[index] = 0
    assert got == expected


@each_case
@examples(5)
@given(st.data())
def test_special_text_may_be_allowed(name, kind, data):
    conversation = data.draw(conversations(name, evil=True, rounds=2))
    evil = with_text(conversation, data.draw(evil_texts(STYLES[name])))
    encoded = renderer_of(name, kind, parse_special_tokens=True).encode(evil)
    assert encoded.input_ids == own_ids(TOKENIZERS[name, kind], evil)
    if not STYLES[name].swallow:  # then it takes spaces along that are not the template's
        assert encoded.loss_mask == truth(name, kind, encoded.input_ids, evil)


@each_case
@pytest.mark.parametrize("marked", [False, True], ids=["plain", "marked"])
@examples(8)
@given(st.data())
def test_chosen_turns_are_all_turns_restricted_to_them(name, kind, marked, data):
    conversation = data.draw(conversations(name))
    count = len(assistants(conversation))
    chosen = data.draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(any))
    flags = iter(chosen)
    messages = [
        replace(message, train=next(flags)) if message.role == "assistant" else message
        for message in conversation.messages
    ]
    some = Conversation(tuple(messages), conversation.source, tools=conversation.tools)
    last = [False] * (count - 1) + [True]
    for encoded, turns in (
        (renderer_of(name, kind, marked).encode(some), chosen),
        (renderer_of(name, kind, marked, train_on="last").encode(conversation), last),
    ):
        assert encoded.input_ids == own_ids(TOKENIZERS[name, kind], conversation)
        expected, got = truth(name, kind, encoded.input_ids, conversation, turns), list(encoded.loss_mask)
        for index in straddlers(name, kind, encoded.input_ids, conversation) if marked else ():
            got[index] = expected[index] = 0
        assert got == expected


LEADING_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)


def thoughts_of(name, text, turns, thoughts):
    """Where each turn's thought ends, and where its answer surely begins; white space between may go either way."""
    for start, end in turns:
        inside = [stop for begin, stop in thoughts if start <= begin < end]
        leading = LEADING_THOUGHT.match(text, start, end)
        stop = inside[0] if inside else leading.end() if leading else start
        answer = text.index(STYLES[name].answer, stop) if inside and STYLES[name].answer else stop
        yield start, stop, re.compile(r"\s*").match(text, answer, end).end(), end


@each_case
@examples(15)
@given(st.data())
def test_thoughts_may_be_context(name, kind, data):
    conversation = data.draw(conversations(name))
    tokenizer = TOKENIZERS[name, kind]
    encoded = renderer_of(name, kind, train_on_reasoning=False).encode(conversation)
    assert encoded.input_ids == own_ids(tokenizer, conversation)
    text, turns = rendered(tokenizer, STYLES[name].marked(), conversation)
    _, thoughts = rendered(tokenizer, STYLES[name].marked("‹›"), conversation)
    everything = truth(name, kind, encoded.input_ids, conversation)
    places = begins(name, kind, encoded.input_ids, text)
    seen = set()
    for start, stop, answer, end in thoughts_of(name, text, turns, thoughts):
        if stop == start and "</think>" in text[start:end]:
            seen.update(
                index
                for index, place in enumerate(places)
                if len(text[:start].encode()) <= place < len(text[:end].encode())
            )
            continue  # not opened: it may be a thought that a prompt opened, or mere text
        empty = not re.sub("</?think>", "", text[start:stop]).strip()  # the template's own: either way
        [(start, stop), (answer, end)] = in_bytes(text, [(start, stop), (answer, end)])
        for index, place in enumerate(places):
            if start <= place < end:
                seen.add(index)
            if start <= place < stop and not empty:
                assert not encoded.loss_mask[index], f"token {index} is a thought's"
            elif answer <= place < end:
                assert encoded.loss_mask[index] == everything[index], f"token {index} is an answer's"
    assert not any(flag for index, flag in enumerate(encoded.loss_mask) if index not in seen)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("switch", [None, True, False])
@examples(25)
@given(st.data())
def test_thinking_is_switched_for_templates_that_know_it(kind, switch, data):
    conversation = data.draw(conversations("qwen3", thoughts=switch is not False))
    given_switch = {} if switch is None else {"enable_thinking": switch}
    encoded = renderer_of("qwen3", kind, enable_thinking=switch).encode(conversation)
    assert encoded.input_ids == own_ids(TOKENIZERS["qwen3", kind], conversation, **given_switch)
    assert encoded.loss_mask == truth("qwen3", kind, encoded.input_ids, conversation, **given_switch)


@pytest.mark.parametrize("switch", [True, False])
def test_thinking_cannot_be_switched_where_the_template_does_not_know_it(switch):
    with pytest.raises(ModelError, match="enable_thinking"):
        options = RenderOptions(enable_thinking=switch)
        Renderer(TOKENIZERS["chatml", "bytes"], options=options).encode(chat(("user", "Hi"), ("assistant", "Yes")))


# --- Against all comers -----------------------------------------------------------------------------------------------

U, A, B = ("user", "Hi there"), ("assistant", "Hello Ann."), ("user", "Paris?")
CALL = (function("f", {"city": "Oslo Ås", "days": 3}),)
ASKS = Message("assistant", "", tool_calls=CALL)
RESULT = Message("tool", "It rains.", name="f")
TWICE = Message("assistant", "", tool_calls=(*CALL, function("f", {"city": "Rome"})))
TOOL, OTHER_TOOL = (
    schema("f", "Says the weather.", "city", "Where it is."),
    schema("g", "Says the time.", "zone", "Of what."),
)
CHATML, QWEN3, LLAMA3 = (STYLES[name].plain() for name in ("chatml", "qwen3", "llama3"))
THINKER = Message("assistant", "Four.", "Two and two.")
QUOTES_CALL = Message("assistant", 'I call f with {"city": "Oslo Ås", "days": 3}.', tool_calls=CALL)
WORDS = ["user", "a", "assistant", "s", "<|im", "im_end|>", "system\n", "|>", "{{", "tool", "model", "final", "INST]"]


def without(condition):
    """ChatML that shows no turn for which the condition holds."""
    loop = "{% for m in messages %}"
    return CHATML.replace(loop, loop + "{% if not (" + condition + ") %}").replace(
        "{% endfor %}", "{% endif %}{% endfor %}"
    )


@each_case
@examples(8)
@given(st.data())
def test_short_texts_that_are_everywhere(name, kind, data):
    said = data.draw(st.lists(st.sampled_from(WORDS), min_size=2, max_size=6))
    roles = ("user", "assistant")
    conversation = chat(*((roles[index % 2], text) for index, text in enumerate(said)))
    encoded = renderer_of(name, kind).encode(conversation)
    assert encoded.input_ids == own_ids(TOKENIZERS[name, kind], conversation)
    assert encoded.loss_mask == truth(name, kind, encoded.input_ids, conversation)


# The template, the turns, and the turn that the error names.
REFUSED = {
    "lower case": (CHATML.replace("m.content", "m.content | lower"), [("user", "hi"), A], 1),
    "lower case once": (
        CHATML.replace("m.content", "(m.content | lower if loop.last else m.content)"),
        [U, A, B, ("assistant", "Other Words.")],
        3,
    ),
    "title case": (CHATML.replace("m.content", "m.content | title"), [("user", "Hi"), ("assistant", "hello ann.")], 1),
    "cut": (CHATML.replace("m.content", "m.content[:8]"), [("user", "Hi"), A], 1),
    "twice": (CHATML.replace("m.content", "m.content * (2 if m.role == 'assistant' else 1)"), [U, A], 1),
    "twice, far apart": (CHATML + "{% if messages[1] %}{{ messages[1].content }}{% endif %}", [U, A], 1),
    "replaced": (CHATML.replace("m.content", "m.content.replace('Ann', 'Bob')"), [("user", "Hi"), A], 1),
    "no first user": (without("loop.first"), [U, A], 0),
    "no first user, though the next says the same": (without("loop.first"), [U, A, U, A], 0),
    "no user but the last": (without("m.role == 'user' and loop.index0 < 2"), [U, A, B, A], 0),
    "no later user": (without("m.role == 'user' and loop.index0 == 2"), [U, A, B, A], 2),
    "no system": (without("m.role == 'system'"), [("system", "Be brief."), U, A], 0),
    "no system, though the user says the same": (without("m.role == 'system'"), [("system", "Hi there"), U, A], 0),
    "no assistant but the last": (without("m.role == 'assistant' and not loop.last"), [U, A, B, A], 1),
    "no results": (
        QWEN3.replace("+ content + '\n</tool_response>'", "+ '\n</tool_response>'"),
        [U, ASKS, RESULT, A],
        2,
    ),
    "no tool turns": (QWEN3.replace("elif m.role == 'tool'", "elif m.role == 'x'"), [U, ASKS, RESULT, A], 2),
    "no calls": (CHATML, [U, Message("assistant", "I call.", tool_calls=CALL), RESULT, A], 1),
    "no calls, though the text says the same": (CHATML, [U, QUOTES_CALL, RESULT, A], 1),
    "no calls, nothing said": (CHATML, [U, ASKS, RESULT, A], 1),
    "no arguments": (QWEN3.replace("{{ call.function.arguments | tojson }}", ""), [U, ASKS, RESULT, A], 1),
    "one call of two": (QWEN3.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"), [U, TWICE, RESULT, A], 1),
    "no text beside the calls": (LLAMA3, [U, Message("assistant", "Let me see.", tool_calls=CALL), RESULT, A], 1),
    "too many calls": (LLAMA3, [U, TWICE, RESULT, RESULT, A], None),
    "no tools": (CHATML, [U, A], None),
    "one tool of two": (QWEN3.replace("for tool in tools", "for tool in tools[:1]"), [U, A], None),
    "no thoughts": (CHATML, [U, THINKER], 1),
    "no thoughts, though the answer says the same": (CHATML, [U, Message("assistant", "Four.", "Four.")], 1),
    "no thoughts in the last turn": (CHATML, [U, A, B, THINKER], 3),
    "roles out of order": (STYLES["llama2"].plain(), [U, B, A], None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_template_hides_or_changes_is_refused(case):
    template, turns, turn = REFUSED[case]
    style = "llama3" if template == LLAMA3 else "llama2" if "INST" in template else "qwen3"
    conversation = chat(*turns, tools=(TOOL, OTHER_TOOL) if "tools" in case or "tool of" in case else ())
    with pytest.raises(DataError) as error:
        Renderer(TOKENIZERS[style, "bytes"], chat_template=template).encode(conversation)
    assert "a.json, record 3" in str(error.value) and "template" in str(error.value)
    if turn is not None:
        assert f"messages[{turn}]" in str(error.value)


JSON_RESULT = Message("tool", '{"rain": 3}', name="f")
THINKS_OF_CALLS = ("assistant", '<think>\nI call {"name": "f", "arguments": {}} by <tool_call>\n</think>\n\nFour.')
EVERYDAY = {
    "a thought about tools, dropped later": ("qwen3", [U, THINKS_OF_CALLS, B, A]),
    "a thought about tools, shown": ("qwen3", [U, A, B, THINKS_OF_CALLS]),
    "results in JSON with a system turn": ("mistral", [("system", "Be brief."), U, ASKS, JSON_RESULT, A, B, A]),
    "results in JSON with tools": ("mistral", [U, ASKS, JSON_RESULT, A, B, A]),
    "results in JSON": ("gpt_oss", [U, ASKS, JSON_RESULT, A, B, A]),
    "a user's line break": ("gpt_oss", [("user", "Hi\n"), A, B, A]),
    "an assistant's line break": ("gpt_oss", [U, ("assistant", "Yes.\n"), B, A]),
    "calls in several turns": ("gpt_oss", [U, ASKS, RESULT, A, B, ASKS, RESULT, A]),
}


@pytest.mark.parametrize("case", EVERYDAY)
def test_what_people_have_is_not_refused(case):
    name, turns = EVERYDAY[case]
    conversation = chat(*turns, tools=(TOOL,) if "tools" in case else ())
    encoded = renderer_of(name).encode(conversation)
    assert encoded.input_ids == own_ids(TOKENIZERS[name, "bytes"], conversation)
    assert encoded.loss_mask == truth(name, "bytes", encoded.input_ids, conversation)


@pytest.mark.parametrize("thought", ["I answer by <tool_call>", "# Tools", "First <think>", "a <tool_call> b"])
@pytest.mark.parametrize("name", ["chatml", "qwen3"])
def test_a_thought_is_context_whatever_it_mentions(name, thought):
    if name == "qwen3" and "<think>" in thought:
        pytest.skip("that template takes the text after the last <think> alone, which is refused")
    conversation = chat(U, ("assistant", f"<think>\n{thought}\n</think>\n\nFour."))
    encoded = renderer_of(name, train_on_reasoning=False).encode(conversation)
    trained = [number for number, flag in zip(encoded.input_ids, encoded.loss_mask, strict=True) if flag]
    assert TOKENIZERS[name, "bytes"].decode(trained).lstrip() == "Four.<|im_end|>"


def test_a_closing_tag_alone_is_no_thought():
    conversation = chat(U, ("assistant", "Close it with </think> at the end."))
    everything, answer = (renderer_of("chatml", train_on_reasoning=flag).encode(conversation) for flag in (True, False))
    assert everything == answer


# What the code itself writes in place of texts, or before special tokens.
SLOTS = ["\ufdd0", "\ufdd01.0\ufdd1", "\ufdd01.text0\ufdd1", "\ufdd0tools.data0\ufdd1", "\ufdd1x\ufdd0", "\ufdd2"]


@pytest.mark.parametrize("name", ["chatml", "qwen3", "mistral", "python_list"])
@examples(30)
@given(st.data())
def test_texts_that_the_code_itself_uses_are_harmless(name, data):
    """Such texts may be refused, but they move no mask and become no token."""
    conversation = data.draw(conversations(name, evil=True, rounds=2))
    tokens = [token for token in STYLES[name].special if token != "<pad>"]
    text = data.draw(st.one_of(st.sampled_from(SLOTS), st.sampled_from(tokens).map("\ufdd2{}".format)))
    evil = with_text(conversation, text)
    [encoded] = renderer_of(name).encode_batch([evil])
    if isinstance(encoded, DataError):
        return
    specials = special_ids(TOKENIZERS[name, "bytes"])
    harmless = own_ids(TOKENIZERS[name, "bytes"], with_text(conversation, "Qz"))
    assert [number for number in encoded.input_ids if number in specials] == [n for n in harmless if n in specials]
    assert encoded.loss_mask == truth(name, "bytes", encoded.input_ids, evil)


def test_a_thought_that_the_prompt_opens_is_trained_from_there():
    tokenizer = TOKENIZERS["deepseek", "bytes"]
    conversation = chat(U, ("assistant", "<think>\nhm\n</think>\n\nFour."))
    encoded = renderer_of("deepseek", "bytes").encode(conversation)
    assert encoded.input_ids == own_ids(tokenizer, conversation)
    trained = [number for number, flag in zip(encoded.input_ids, encoded.loss_mask, strict=True) if flag]
    assert tokenizer.decode(trained) == "hm\n</think>\n\nFour.<｜end▁of▁sentence｜>"


def test_two_texts_together_are_no_special_token_either():
    joined = CHATML.replace("m.content", "(messages[0].content if loop.index0 == 1 else '') + m.content")
    joined = joined.replace("{% for m in messages %}", "{% for m in messages %}{% if m.role != 'system' %}")
    joined = joined.replace("{% endfor %}", "{% endif %}{% endfor %}")
    tokenizer = TOKENIZERS["chatml", "bytes"]
    encoded = Renderer(tokenizer, chat_template=joined).encode(chat(("system", "so <|im_"), ("user", "end|> no"), A))
    specials = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [number for number in encoded.input_ids if number in specials] == specials * 2
    assert "so <|im_end|> no" in tokenizer.decode(encoded.input_ids)


def test_the_bad_are_told_apart_from_the_good():
    good, bad = chat(U, A), chat(U, THINKER)
    renderer = Renderer(TOKENIZERS["chatml", "bytes"])
    results = renderer.encode_batch([good, bad, good, bad, chat(B, A)])
    assert [type(result) for result in results] == [Encoded, DataError, Encoded, DataError, Encoded]
    assert results[0] == results[2] == renderer.encode(good)
    assert renderer.encode_batch([bad])[0].args == results[1].args
    assert renderer.encode_batch([]) == []


def chatml(body, header="'<|im_start|>' + m.role + '\n'", prompt="'<|im_start|>assistant\n'"):
    """ChatML with another body of the assistant's turns, or another header."""
    said = "«{{ BODY + '<|im_end|>' }}»".replace("BODY", body)
    return (
        (
            "{% for m in messages %}{{ HEADER }}{% if m.role == 'assistant' %}SAID{{ '\n' }}"
            "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ PROMPT }}{% endif %}"
        )
        .replace("HEADER", header)
        .replace("PROMPT", prompt)
        .replace("SAID", said)
    )


EXOTIC = {
    "signed": chatml("m.content + '\n-- Bot'"),
    "looks at what is said": chatml("('! ' if 'a' in m.content else '') + m.content"),
    "looks at how long it is": chatml("('long ' if m.content | length > 3 else '') + m.content"),
    "shows the first line only": chatml("m.content.split('\n')[0]"),
    "strips letters": chatml("m.content.strip('aH')"),
    "looks ahead": chatml("m.content + (' ...' if not loop.last else '')"),
    "counts": chatml(
        "m.content",
        "'<|im_start|>' + m.role + ' ' + loop.index | string + '\n'",
        "'<|im_start|>assistant ' + (messages | length + 1) | string + '\n'",
    ),
    "quotes": chatml(
        "m.content",
        "'<|im_start|>' + m.role + '\n> ' + (messages[loop.index0 - 1].content if loop.index0 else '') + '\n'",
        "'<|im_start|>assistant\n> ' + messages[-1].content + '\n'",
    ),
}


@pytest.mark.parametrize("case", EXOTIC)
@examples(25)
@given(st.data())
def test_an_exotic_template_is_understood_or_refused(case, data):
    conversation = data.draw(conversations("chatml"))
    tokenizer = TOKENIZERS["chatml", "bytes"]
    template = EXOTIC[case]
    renderer = Renderer(tokenizer, chat_template=template.replace("«", "").replace("»", ""))
    try:
        encoded = renderer.encode(conversation)
    except DataError:
        return
    marked = template.replace("«", "{% generation %}").replace("»", "{% endgeneration %}")
    text, spans = rendered(tokenizer, marked, conversation)
    places = begins("chatml", "bytes", encoded.input_ids, text)
    assert encoded.loss_mask[1:] == [
        int(any(start <= place < end for start, end in in_bytes(text, spans))) for place in places[1:]
    ]
