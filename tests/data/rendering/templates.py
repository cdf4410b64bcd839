"""Chat templates in the style of well-known ones, with marks that define the expected mask.

« and » enclose what the model must produce in one assistant turn: one pair per message, in order.
‹ and ›, inside of these, enclose reasoning with its tags.
"""

import json
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support import tiny

MARKS = str.maketrans("", "", "«»‹›")

# Where the system turn stands apart, and the index of the last user turn of `rest` is wanted.
REST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in rest %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}«{{ m.content + '<|im_end|>' }}»{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML
)
TRIMMED = CHATML.replace("m.content", "m.content.strip()")
PADDED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' }}"
    "{% if m.role == 'assistant' %}«{{ ' ' + m.content + ' \n<|im_end|>' }}»{{ '\n\n' }}"
    "{% else %}{{ '\n ' + m.content + ' \n<|im_end|>\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)
COMPACT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' %}«{{ m.content + '<|end|>' }}»"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Drops the thinking of earlier turns and opens an empty thought in the last one; merges the results of tools.
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ '# Tools\n\nYou may call these.\n\n<tools>' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}"
    "{{ '\n</tools>\n\nAnswer with <tool_call>\n{\"name\": <name>}\n</tool_call>.<|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(seek=true, last=messages | length - 1) %}"
    "{% for m in messages[::-1] %}{% if ns.seek and m.role == 'user' and not"
    " (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}"
    "{% set ns.seek = false %}{% set ns.last = messages | length - 1 - loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "{% if m.role == 'user' %}{{ '<|im_start|>user\n' + content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% set shown = loop.index0 > ns.last and (loop.last or thought) %}"
    "{% set content = content.lstrip('\n') if shown else content %}"
    "{% set said %}{{ content }}{% for call in m.tool_calls or [] %}"
    "{% if content or not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>' }}{% endset %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if shown and not thought and enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}«{{ said }}»"
    "{% elif shown %}«‹{{ '<think>\n' + thought.strip('\n') + '\n</think>' }}›{{ '\n\n' + said }}»"
    "{% else %}«{{ said }}»{% endif %}{{ '\n' }}"
    "{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
# One call a turn; the results of tools as JSON strings; the date.
LLAMA3 = (
    REST
    + "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n\n' }}"
    "{% if tools %}{{ 'You have access to these functions.\n\n' }}"
    "{% for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{% endif %}"
    "{{ system | trim + '<|eot_id|>' }}{% for m in rest %}"
    "{% if m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
    "{{ m.content | tojson }}{{ '<|eot_id|>' }}"
    "{% elif m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "«{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{ call.arguments | tojson }}{{ '}<|eot_id|>' }}»"
    "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}«{{ m.content | trim + '<|eot_id|>' }}»"
    "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set text = system + m.content if loop.first else m.content %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}«{{ ' ' + text.strip() + ' ' + eos_token }}»{% endif %}{% endfor %}"
)
# The system turn and the tools go into the last user turn.
MISTRAL = (
    REST + "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}"
    "{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' }}{% if system and loop.index0 == ns.last %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}«{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}"
    "{% set said = {'name': call.function.name, 'arguments': call.function.arguments} %}"
    "{{ (dict(said, id=call.id) if call.id else said) | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}{{ ']' + eos_token }}»"
    "{% elif m.role == 'assistant' %}«{{ ' ' + m.content | trim + eos_token }}»"
    "{% else %}{{ '[TOOL_RESULTS] {\"content\": ' }}{{ m.content | tojson }}"
    "{% if m.tool_call_id %}{{ ', \"call_id\": \"' + m.tool_call_id + '\"' }}{% endif %}{{ '}[/TOOL_RESULTS]' }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    REST + "{{ bos_token }}{% for m in rest %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' }}{% if system and loop.first %}{{ system | trim + '\n\n' }}{% endif %}"
    "{% if role == 'model' %}«{{ m.content | trim }}{{ '<end_of_turn>' }}»"
    "{% else %}{{ m.content | trim }}{{ '<end_of_turn>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' %}«{{ m.content + '<|end|>' }}»{{ '\n' }}"
    "{% else %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# The prompt opens a thought; after the results of tools the model goes on without a header.
DEEPSEEK = (
    REST + "{{ bos_token + system }}{% for tool in tools or [] %}{{ '\n\n### ' + tool.function.name + '\n' }}"
    "{{ tool | tojson }}{% endfor %}{% for m in rest %}{% set said = m.content %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}"
    "{% else %}{% set answers = loop.first or rest[loop.index0 - 1].role != 'tool' %}"
    "{% set thought = m.reasoning_content if loop.index0 > ns.last else '' %}"
    "{% set said %}{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\n```json\n' }}"
    "{{ call.function.arguments | tojson }}{{ '\n```<｜tool▁call▁end｜>' }}{% endfor %}{{ eos_token }}{% endset %}"
    "{{ '<｜Assistant｜>' if answers }}"
    "{% if thought and answers %}{{ '<think>\n' }}«‹{{ thought + '\n</think>' }}›{{ '\n\n' + said }}»"
    "{% elif thought %}«‹{{ '<think>\n' + thought + '\n</think>' }}›{{ '\n\n' + said }}»"
    "{% else %}«{{ said }}»{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
# Calls as in Python: say(text='it''s'), strings raw.
CALLS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
    "«{{ m.content }}{% for call in m.tool_calls or [] %}CALL{% endfor %}{{ '<|end|>' }}»{{ '\n' }}"
    "{% else %}{% if m.role == 'system' and tools %}{{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PYTHON_CALLS = CALLS.replace(
    "CALL",
    "{{ '\n' + call.function.name + '(' }}{% for key, value in call.function.arguments.items() %}"
    "{{ key + '=' }}{% if value is string %}{{ \"'\" + value + \"'\" }}"
    "{% elif value is iterable %}{{ value | tojson }}{% else %}{{ value }}{% endif %}"
    "{{ ', ' if not loop.last }}{% endfor %}{{ ')' }}",
)
PYTHON_LIST = CALLS.replace(
    "CALL",
    "{{ '[' if loop.first else ', ' }}{{ call.function.name + '(' }}"
    "{% for key, value in call.function.arguments.items() %}{{ key + '=' }}{{ value | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}{{ ')' }}{{ ']' if loop.last }}",
)
XML_CALLS = CALLS.replace(
    "CALL",
    "{{ '\n<tool_call>\n<function=' + call.function.name + '>' }}"
    "{% for key, value in call.function.arguments | items %}{{ '\n<parameter=' + key + '>\n' }}"
    "{% if value is mapping or (value is sequence and value is not string) %}{{ value | tojson }}"
    "{% else %}{{ value | string }}{% endif %}{{ '\n</parameter>' }}{% endfor %}{{ '\n</function>\n</tool_call>' }}",
)
# Channels: earlier turns end with another token than the last; reasoning is a separate message.
GPT_OSS = (
    REST + "{{ '<|start|>system<|message|>Today: ' + strftime_now('%Y-%m-%d') + '\nReasoning: medium<|end|>' }}"
    "{% if system or tools %}{{ '<|start|>developer<|message|># Instructions\n\n' + system }}"
    "{% for tool in tools or [] %}{{ '\n// ' + tool.function.description + '\ntype ' + tool.function.name + ' = ' }}"
    "{{ tool.function.parameters | tojson }}{% endfor %}{{ '<|end|>' }}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start|>functions.' + m.name + ' to=assistant<|channel|>commentary<|message|>' }}"
    "{{ m.content | tojson }}{{ '<|end|>' }}"
    "{% else %}{{ '<|start|>assistant' }}«{% if m.reasoning_content and loop.index0 > ns.last %}"
    "‹{{ '<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}›{{ '<|start|>assistant' }}{% endif %}"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "{{ ' to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}"
    "{{ call.arguments | tojson }}{{ '<|call|>' }}"
    "{% else %}{{ '<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}»"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' %}«{{ m.content + eos_token }}»{{ '\n' }}"
    "{% else %}{{ m.content + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}"
    "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT:' }}«{{ ' ' + m.content + '</s>' }}»{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Style:
    """A template, the tokens that it needs, and what it shows."""

    template: str
    special: list[str]
    eos: str
    bos: str | None = None
    plain_tokens: tuple[str, ...] = ()  # added tokens that are not special, as Qwen's <think>
    swallow: tuple[str, ...] = ()  # special tokens that take the white space after them along
    calls: int = 0  # how many tool calls a turn may hold
    talks: bool = False  # renders the text before a tool call
    thinks: bool = False  # shows `reasoning_content`
    tools_need_system: bool = False
    answer: str = ""  # stands between a thought and the answer, beside white space

    def plain(self) -> str:
        return self.template.translate(MARKS)

    def marked(self, around: str = "«»") -> str:
        """The template with {% generation %} around what the two marks enclose."""
        text = self.template.replace(around[0], "{% generation %}").replace(around[1], "{% endgeneration %}")
        return text.translate(MARKS)

    def tokenizer(self, kind: str = "bytes") -> PreTrainedTokenizerFast:
        kwargs = {"bos_token": self.bos} if self.bos else {}
        if kind == "bytes":
            tokenizer = tiny.build_tokenizer(self.plain(), self.special, self.eos, **kwargs)
        else:
            tokenizer = build_spaced(self.plain(), self.special, self.eos, metaspace=kind == "metaspace", **kwargs)
        tokenizer.add_tokens([AddedToken(token, rstrip=True, special=True) for token in self.swallow])
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in self.plain_tokens])
        return tokenizer


def build_spaced(chat_template, special_tokens, eos_token, *, metaspace: bool, **kwargs) -> PreTrainedTokenizerFast:
    """In the manner of sentencepiece: ▁ for a space, bytes for unknown characters, pieces that reach over words.

    Puts one more ▁ before each stretch of text between special tokens or, with `metaspace`, before the first only.
    """
    core = Tokenizer(models.BPE(PIECES["vocab"], PIECES["merges"], unk_token="<unk>", byte_fallback=True))
    if metaspace:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(list(special_tokens))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos_token, unk_token="<unk>", clean_up_tokenization_spaces=False, **kwargs
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def _train_pieces() -> dict:
    """Pieces as sentencepiece would find them, and the 256 bytes."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Replace(" ", "▁")
    letters = [*map(chr, range(33, 127)), "▁"]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=letters, show_progress=False, max_token_length=5)
    core.train_from_iterator(tiny.CORPUS * 4, trainer)
    numbers = sorted(core.get_vocab().items(), key=lambda item: item[1])
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *(piece for piece, _ in numbers)]
    merges = [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]]
    return {"vocab": {piece: number for number, piece in enumerate(pieces)}, "merges": merges}


PIECES = _train_pieces()
IM = tiny.SPECIAL
S = ["<pad>", "<s>", "</s>"]
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
BRACKETS = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
BRACKETS += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
TURNS = ["<pad>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
DS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁call▁begin｜>"]
DS += ["<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"]
CHANNELS = ["<|endoftext|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"]
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CALLING = {"calls": 2, "talks": True, "tools_need_system": True}
STYLES = {
    "chatml": Style(CHATML, IM, "<|im_end|>"),
    "default_system": Style(DEFAULT_SYSTEM, IM, "<|im_end|>"),
    "trimmed": Style(TRIMMED, IM, "<|im_end|>"),
    "padded": Style(PADDED, IM, "<|im_end|>"),
    "compact": Style(COMPACT, ["<pad>", *ROLES], "<|end|>"),
    "qwen3": Style(QWEN3, IM, "<|im_end|>", plain_tokens=TAGS, calls=2, talks=True, thinks=True),
    "llama3": Style(LLAMA3, HEADERS, "<|eot_id|>", bos="<|begin_of_text|>", calls=1),
    "llama2": Style(LLAMA2, S, "</s>", bos="<s>"),
    "mistral": Style(MISTRAL, [*S, *BRACKETS], "</s>", bos="<s>", calls=2),
    "gemma": Style(GEMMA, TURNS, "<end_of_turn>", bos="<bos>"),
    "phi": Style(PHI, ["<|endoftext|>", *ROLES], "<|endoftext|>"),
    "phi_swallow": Style(PHI, ["<|endoftext|>"], "<|endoftext|>", swallow=tuple(ROLES)),
    "deepseek": Style(DEEPSEEK, DS, DS[1], bos=DS[0], plain_tokens=TAGS[:2], calls=2, talks=True, thinks=True),
    "python_calls": Style(PYTHON_CALLS, ["<pad>", *ROLES, "<|tool|>"], "<|end|>", **CALLING),
    "python_list": Style(PYTHON_LIST, ["<pad>", *ROLES, "<|tool|>"], "<|end|>", **CALLING),
    "xml_calls": Style(XML_CALLS, ["<pad>", *ROLES, "<|tool|>"], "<|end|>", **CALLING),
    "gpt_oss": Style(GPT_OSS, CHANNELS, "<|return|>", calls=1, thinks=True, answer="<|message|>"),
    "zephyr": Style(ZEPHYR, S, "</s>"),
    "vicuna": Style(VICUNA, S, "</s>", bos="<s>"),
}
KINDS = {"llama2": ("prepend",), "vicuna": ("prepend", "metaspace"), "mistral": ("prepend", "metaspace")}
KINDS |= {"gemma": ("metaspace",), "zephyr": ("prepend",), "compact": ("prepend",), "qwen3": ("metaspace",)}
CASES = [(name, kind) for name in STYLES for kind in ("bytes", *KINDS.get(name, ()))]
