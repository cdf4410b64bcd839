"""Random conversations that a template can render, including ones with special text, tools and reasoning."""

from functools import cache
from random import Random

from hypothesis import strategies as st

from sft_recipe.data.messages import Conversation, Message
from sft_recipe.data.rendering.renderer import Renderer, RenderOptions
from tests.data.rendering.oracles import SEARCH, TOKENIZERS
from tests.data.rendering.templates import STYLES

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
