"""Conversation + tokenizer -> token ids and loss mask, together."""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from os.path import commonprefix
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from sft_recipe.data.messages import Conversation, located
from sft_recipe.errors import ModelError

# A slot stands for a text in a rendering: a name between two code points that Unicode gives to no character.
SLOT = "\ufdd0{}.{}\ufdd1"
FIND_SLOT = re.compile("\ufdd0([0-9]+[.][0-9]+)\ufdd1")
TAG = re.compile(r"</?\w+>")
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
OPENED_THOUGHT = re.compile(r"\s*(<\w+>\s*(</\w+>\s*)?)?")
MAX_PLANS = 4096

Messages = list[dict[str, str]]
Span = tuple[int, int]  # [start, end) in characters


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model sees it: per token its id, and 1 if it is trained.

    <|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> assistant \\n Yes <|im_end|> \\n
         0        0   0  0      0      0       0           0     0   1      1      0
    """

    input_ids: list[int]
    loss_mask: list[int]


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a base model's tokenizer a plain ChatML template; False if it had a template of its own.

    A turn must end with a token that the model has. If `<|im_end|>` is one, all is as usual. If not, the
    markers are plain text to the model and the assistant ends with the eos token in place of `<|im_end|>`. A
    tokenizer that begins texts with bos gets it here too, since what a template renders is tokenised without.
    Raises ModelError if there is no eos token either.
    """
    if tokenizer.chat_template:
        return False
    end = "'<|im_end|>'"
    if "<|im_end|>" not in _special_tokens(tokenizer):
        if not tokenizer.eos_token:
            raise ModelError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template and no eos token, so that no "
                "turn could end; set eos_token in its tokenizer_config.json, or give it a chat template."
            )
        end = f"(eos_token if message['role'] == 'assistant' else {end})"
    begin = "{{ bos_token }}" if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else ""
    tokenizer.chat_template = (
        f"{begin}{{% for message in messages %}}"
        f"{{{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + {end} + '\\n' }}}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return True


class Renderer:
    """Encodes conversations by the tokenizer's chat template, or by the one given.

    Raises ModelError for a tokenizer without offsets or without a template, for a template that is no Jinja
    and, on encoding, for one that ends the assistant's turns with no special token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat_template: str | None = None):
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise ModelError(
                f"{self.name}: the slow tokenizer {type(tokenizer).__name__} does not say which text a token "
                "stands for, so that no mask can be made; use a fast one (tokenizer.json)."
            )
        try:
            self.template = tokenizer.get_chat_template(chat_template)
            lexed = jinja2.Environment().lexer.tokenize(self.template)
            literals = {token.value.strip() for token in lexed if token.type == "string"}
        except (ValueError, jinja2.TemplateSyntaxError) as error:
            raise ModelError(f"{self.name}: no usable chat template: {error}") from error
        self.marked = GENERATION.search(self.template) is not None
        # What a template may look for in a text, such as '</think>', '/no_think', not names like 'role'.
        literals.update(TAG.findall(self.template))
        self.looked_for = _any_of(text for text in literals if len(text) > 2 and not text.isidentifier())
        specials = _special_tokens(tokenizer)
        self.special = _any_of(specials)
        self.special_ids = {tokenizer.convert_tokens_to_ids(token) for token in specials}
        self.plans: dict[tuple[str, ...], _Plan] = {}

    def encode(self, conversation: Conversation) -> Encoded:
        """Token ids and mask of one conversation; raises as `encode_batch` does."""
        return self.encode_batch([conversation])[0]

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Token ids and masks, in order, tokenised together.

        Raises DataError, naming the source, where the template refuses a conversation or where what to train
        on cannot be located with certainty.
        """
        if self.marked or not conversations:
            return [self._encode_marked(conversation) for conversation in conversations]
        texts, spans = [], []
        for conversation in conversations:
            with self._naming(conversation):
                messages = conversation.as_dicts()
                texts.append(self._render(messages))
                spans.append(self._locate(messages, texts[-1]))
        tokens = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        encoded = []
        for index, conversation in enumerate(conversations):
            ids, offsets = tokens["input_ids"][index], tokens["offset_mapping"][index]
            with self._naming(conversation):
                encoded.append(Encoded(ids, self._mask(texts[index], spans[index], ids, offsets)))
        return encoded

    def _encode_marked(self, conversation: Conversation) -> Encoded:
        """By a template with {% generation %}, which is taken at its word."""
        with self._naming(conversation):
            kwargs = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
            tokens = self._apply(conversation.as_dicts(), **kwargs)
            mask = [0, *tokens["assistant_masks"][1:]]
            if 1 not in mask:
                raise _Problem("marks no token with {% generation %}")
            return Encoded(tokens["input_ids"], mask)

    @contextmanager
    def _naming(self, conversation: Conversation) -> Iterator[None]:
        """Turns a _Problem into a DataError that names the source and the template."""
        try:
            yield
        except _Problem as problem:
            raise located(conversation.source, f"the chat template of {self.name} {problem}") from problem

    def _render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        return self._apply([messages], tokenize=False, add_generation_prompt=add_generation_prompt)[0]

    def _apply(self, messages: Any, **kwargs: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.template, **kwargs)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"{self.name}: no usable chat template: {error}") from error
        except Exception as error:  # a template is a program: whatever it raises is about these messages
            raise _Problem(f"refuses the conversation: {str(error).strip().rstrip('.')}") from error

    def _locate(self, messages: Messages, text: str) -> list[Span]:
        """What to train on in each assistant turn of the rendered text; raises _Problem if that is uncertain.

        A second rendering, of the same messages with slots in place of what they say, shows where the
        template puts what: "U: [0.0]\\nA: [1.0]</s>". It holds for `text` if that is the same with the slots
        filled, and so for all conversations of this shape. A template may look at what others say: the last
        try keeps that.
        """
        problem = "changes what the turns say"
        for keep_others in (False, True):
            shapes, said = self._shapes(messages, keep_others)
            key = tuple(part for shape in shapes for part in shape.values())
            spans = self.plans[key].spans(said, text) if key in self.plans else None
            if spans is None:  # not planned yet, or planned yesterday for a template that shows the date
                try:
                    plan = self._plan(shapes)
                except _Problem as error:
                    problem = str(error)
                    continue
                if len(self.plans) >= MAX_PLANS:
                    self.plans.clear()
                self.plans[key] = plan
                spans = plan.spans(said, text)
            if spans is not None:
                return spans
        raise _Problem(
            f"{problem}, so that what to train on cannot be located with certainty; put {{% generation %}} "
            "marks around the assistant's part of the template, or use another one"
        )

    def _shapes(self, messages: Messages, keep_others: bool) -> tuple[Messages, dict[str, str]]:
        """The messages with slots in place of what they say, and what each slot stands for.

        What a template may look at stays: white space at the edges, and the strings that it looks for.

        "<think>hm</think>\\n\\nHi"  ->  "<think>[1.2]</think>\\n\\n[1.4]", {"1.2": "hm", "1.4": "Hi"}
        """
        shapes: Messages = []
        said: dict[str, str] = {}
        for index, message in enumerate(messages):
            content = message["content"]
            if message["role"] == "assistant" or not keep_others:
                pieces = self.looked_for.split(content)  # at odd places stands what is looked for
                if not "".join(pieces[::2]).strip():
                    pieces = [content]  # all of it happens to be text that the template has too
                for number in range(0, len(pieces), 2):
                    core = pieces[number].strip()
                    if core:
                        said[f"{index}.{number}"] = core
                        pieces[number] = pieces[number].replace(core, SLOT.format(index, number), 1)
                content = "".join(pieces)
            shapes.append({"role": message["role"], "content": content})
        return shapes, said

    def _plan(self, shapes: Messages) -> "_Plan":
        """What to train on, in terms of the template's own text; raises _Problem if that is not certain."""
        literals, slots = _split(self._render(shapes))
        turns = []
        for index, shape in enumerate(shapes):
            if shape["role"] != "assistant":
                continue
            first, last = _places(slots, index)
            prompt, before = _split(self._render(shapes[:index], add_generation_prompt=True))
            if before[-1:] != slots[:first][-1:]:
                raise _Problem(f"does not show messages[{index}] (assistant) after its generation prompt")
            start = _shared(prompt[-1], literals[first])
            end = self._end(shapes[: index + 1], literals[last], is_last=index + 1 == len(shapes))
            turns.append((first, start, last, end))
        return _Plan(literals, slots, turns)

    def _end(self, shapes: Messages, follows: str, is_last: bool) -> int:
        """How much of what follows the content of the last of these messages ends its turn.

        the conversation ends here    <|end|>\\n<|endoftext|>
        someone else goes on          <|end|>\\n<|user|>\\n         the last special token of both ends it
        """
        index = len(shapes) - 1
        alone = follows if is_last else self._after(shapes, index)
        ends = [match.end() for match in self.special.finditer(alone)]
        if not ends:
            raise ModelError(
                f"{self.name}: the chat template ends the assistant's turn with {alone!r}, which holds no "
                "special token, so that the model would never learn to stop; put eos_token there."
            )
        if is_last:
            another = {"role": "user", "content": SLOT.format(index + 1, 0)}
            try:
                follows = self._after([*shapes, another], index)
            except _Problem:
                return ends[-1]
        shared = len(commonprefix([alone, follows]))
        both = [end for end in ends if end <= shared]
        if not both and not is_last:
            raise _Problem(f"ends messages[{index}] (assistant) with {alone!r} only when it is the last")
        return (both or ends)[-1]

    def _after(self, shapes: Messages, index: int) -> str:
        """The template's own text that follows the content of a message."""
        literals, slots = _split(self._render(shapes))
        return literals[_places(slots, index)[1]]

    def _mask(self, text: str, spans: list[Span], ids: list[int], offsets: list[Span]) -> list[int]:
        """1 on the tokens that begin in a span; raises _Problem if these do not mean what stands there."""
        mask = [0] * len(ids)
        for start, end in spans:
            first, last = bisect_left(offsets, (start,)), bisect_left(offsets, (end,))
            turn = ids[first:last]
            if not turn or turn[-1] not in self.special_ids:
                raise _Problem(f"ends a turn with {text[start:end][-20:]!r}, which is not one token there")
            # The first bytes of the first character may be in a token that straddles the start.
            begin = max(offsets[first][0], offsets[first - 1][1]) if first else 0
            self._check_meaning(turn, text[begin : offsets[last - 1][1]])
            mask[first:last] = [1] * len(turn)
        mask[0] = 0
        return mask

    def _check_meaning(self, turn: list[int], shown: str) -> None:
        decoded = self.tokenizer.backend_tokenizer.decode(turn, skip_special_tokens=False)
        if decoded == shown or self.tokenizer.unk_token_id in turn:
            return
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        if _bare(decoded, normalizer) != _bare(shown, normalizer):
            raise _Problem(f"shows {shown[:80]!r}, but the tokens there mean {decoded[:80]!r}")


class _Problem(Exception):
    """What a chat template does, as the end of a sentence; becomes a DataError that names the source."""


@dataclass(frozen=True)
class _Plan:
    """The template's own text around the slots and, in it, what to train on.

    A turn is trained from an offset in one literal to an offset in another:

    literals    ["U: ", "\\nA: ", "</s>"]    slots ["0.0", "1.0"]    turns [(1, 4, 2, 4)]
    """

    literals: list[str]
    slots: list[str]
    turns: list[tuple[int, int, int, int]]

    def spans(self, said: dict[str, str], text: str) -> list[Span] | None:
        """What to train on in a text, or None if this plan with its slots filled is another text."""
        pieces = [self.literals[0]]
        for slot, literal in zip(self.slots, self.literals[1:], strict=True):
            pieces += said.get(slot, ""), literal
        if "".join(pieces) != text:
            return None
        begins = list(accumulate(map(len, pieces), initial=0))[::2]
        return [(begins[first] + start, begins[last] + end) for first, start, last, end in self.turns]


def _split(rendered: str) -> tuple[list[str], list[str]]:
    """The template's own text, and the slots between: "U: [0.0]</s>" -> ["U: ", "</s>"], ["0.0"]."""
    pieces = FIND_SLOT.split(rendered)
    return pieces[::2], pieces[1::2]


def _places(slots: list[str], index: int) -> Span:
    """The [first, last) of a message's slots; raises _Problem if they are missing, repeated or apart."""
    shown = [place for place, slot in enumerate(slots) if slot.startswith(f"{index}.")]
    if not shown:
        raise _Problem(f"does not show messages[{index}] (assistant)")
    first, last = shown[0], shown[-1] + 1
    if len(set(slots[first:last])) != len(shown) or last - first != len(shown):
        raise _Problem(f"shows messages[{index}] (assistant) more than once or in pieces")
    return first, last


def _shared(prompt: str, rendered: str) -> int:
    """How much of the template's text before a content is its generation prompt, which the model is given.

    prompt                    rendered                                shared
    "<|assistant|>\\n"         "<|assistant|>\\n<think>\\n</think>\\n"    "<|assistant|>\\n"
    "<|assistant|><think>"    "<|assistant|></think>"                 "<|assistant|>"

    Raises _Problem if they differ by more than white space or a thought that the prompt opens.
    """
    shared = len(commonprefix([prompt, rendered]))
    if shared in (len(prompt), len(rendered)):
        return shared
    tag = rendered.rfind("<", 0, shared)
    if tag >= 0 and ">" not in rendered[tag:shared]:
        shared = tag
    if not OPENED_THOUGHT.fullmatch(prompt[shared:]):
        raise _Problem(f"leads to the assistant by {prompt[-80:]!r} or, in a whole chat, by {rendered[-80:]!r}")
    return shared


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The tokens that text is not made of: those flagged special, and eos."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return special | {tokenizer.eos_token} if tokenizer.eos_token else special


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the strings, the longest that fits; nothing if there are none."""
    longer_first = map(re.escape, sorted(strings, reverse=True))
    return re.compile(f"({'|'.join(longer_first) or '(?!)'})")


def _bare(text: str, normalizer: Any) -> str:
    """A text without what tokenizers change and do not give back: white space and Unicode's ways to spell."""
    text = unicodedata.normalize("NFKC", normalizer.normalize_str(text) if normalizer else text)
    return "".join(text.replace("\u2581", "").replace("\ufffd", "").split())
