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

# The text that a turn shows is found by rendering the conversation once more with a slot in place of each text:
# a number between two code points that Unicode reserves for no character.
SLOT = "\ufdd0{}.{}\ufdd1"
FIND_SLOT = re.compile("\ufdd0([0-9]+[.][0-9]+)\ufdd1")
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
THINKING_OPENED = re.compile(r"\s*(<\w+>\s*(</\w+>\s*)?)?")
MAX_PLANS = 4096

Messages = list[dict[str, str]]
Span = tuple[int, int]  # [start, end) in characters


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model sees it; both lists have one entry per token, `loss_mask` 1 where it is trained.

    user "Hi", assistant "Yes"    <|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> assistant \\n Yes <|im_end|> \\n
    loss_mask                          0        0   0  0      0      0        0           0     0   1      1      0
    """

    input_ids: list[int]
    loss_mask: list[int]


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a base model's tokenizer a plain ChatML template; False if it had a template of its own.

    A turn must end with a token that the model has. Where `<|im_end|>` is a special token, that is it; otherwise
    the markers are plain text to the model and the assistant's turns end with its eos token in place of the text
    `<|im_end|>`. A tokenizer that begins every text with bos gets it here too, since templates are tokenised without.
    Raises ModelError for a tokenizer that has neither `<|im_end|>` nor an eos token.
    """
    if tokenizer.chat_template:
        return False
    ends = "'<|im_end|>'"
    if "<|im_end|>" not in _special_tokens(tokenizer):
        if not tokenizer.eos_token:
            raise ModelError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template and no eos token, so no turn could "
                "end; set eos_token in its tokenizer_config.json, or give it a chat template."
            )
        ends = f"(eos_token if message['role'] == 'assistant' else {ends})"
    begins_with_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = (
        ("{{ bos_token }}" if begins_with_bos else "")
        + "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
        + ends
        + " + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return True


class Renderer:
    """Encodes conversations by the tokenizer's chat template, or by the one given.

    Raises ModelError for a tokenizer without offsets or without a template, for a template that is no valid Jinja
    and, when it encodes, for a template that ends turns with no special token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat_template: str | None = None):
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise ModelError(
                f"{self.name}: the slow tokenizer {type(tokenizer).__name__} does not say which text a token stands "
                "for, so no mask can be made; use a fast one (tokenizer.json)."
            )
        try:
            self.template = tokenizer.get_chat_template(chat_template)
            lexed = jinja2.Environment().lexer.tokenize(self.template)
            literals = {token.value.strip() for token in lexed if token.type == "string"}
        except (ValueError, jinja2.TemplateSyntaxError) as error:
            raise ModelError(f"{self.name}: no usable chat template: {error}") from error
        self.marked = GENERATION.search(self.template) is not None
        # What a template may look for in a text ('</think>', '/no_think'); keys such as 'role' are not of that kind.
        self.looked_for = _any_of(text for text in literals if len(text) > 2 and re.search(r"[^\w\s]", text))
        specials = _special_tokens(tokenizer)
        self.special = _any_of(specials)
        self.special_ids = set(tokenizer.convert_tokens_to_ids(specials))
        self.plans: dict[tuple[str, ...], _Plan] = {}

    def encode(self, conversation: Conversation) -> Encoded:
        """Token ids and mask of one conversation; raises as `encode_batch` does."""
        return self.encode_batch([conversation])[0]

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Token ids and masks, in order; much faster than one by one.

        Raises DataError, naming the conversation's source, where the template refuses a conversation or a turn
        cannot be located with certainty.
        """
        if not conversations:
            return []
        if self.marked:
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
            tokens = self._apply(
                conversation.as_dicts(), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            mask = [0, *tokens["assistant_masks"][1:]]
            if 1 not in mask:
                raise _Problem("marks no token with {% generation %}")
            return Encoded(tokens["input_ids"], mask)

    @contextmanager
    def _naming(self, conversation: Conversation) -> Iterator[None]:
        """Turns a _Problem into a DataError that names the conversation's source and the template."""
        try:
            yield
        except _Problem as problem:
            raise located(conversation.source, f"the chat template of {self.name} {problem}") from problem

    def _render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        return self._apply([messages], tokenize=False, add_generation_prompt=add_generation_prompt)[0]

    def _apply(self, messages: Any, **kwargs: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.template, **kwargs)
        except Exception as error:  # a template is a program: whatever it raises is about these messages
            raise _Problem(f"refuses it: {str(error).strip().rstrip('.')}") from error

    def _locate(self, messages: Messages, text: str) -> list[Span]:
        """What to supervise of each assistant turn in the rendered text.

        A second rendering has slots in place of what is said: "U: [0.0]\\nA: [1.0]</s>". The spans found in it hold for
        `text` if that is the same with the slots filled, and so for every conversation of this shape. A template may
        look at what the others say, so the second try keeps that. Raises _Problem if both fail.
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
            f"{problem}, so what to train on cannot be located with certainty; put {{% generation %}} marks around "
            "the assistant's part of the template, or use another one"
        )

    def _shapes(self, messages: Messages, keep_others: bool) -> tuple[Messages, dict[str, str]]:
        """The messages with slots for their texts, and the text of each slot.

        What a template may look at stays: white space at the edges and the strings that it looks for.

            "<think>\\nhm\\n</think>\\n\\nHi"  ->  "<think>\\n[1.0]\\n</think>\\n\\n[1.1]",  {"1.0": "hm", "1.1": "Hi"}
        """
        shapes, said = [], {}
        for index, message in enumerate(messages):
            content = message["content"]
            if message["role"] == "assistant" or not keep_others:
                pieces = self.looked_for.split(content)  # at odd places stands what is looked for
                if not any(piece.strip() for piece in pieces[::2]):
                    pieces = [content]  # the whole text is what the template contains, perhaps by chance
                for number in range(0, len(pieces), 2):
                    core = pieces[number].strip()
                    if core:
                        said[f"{index}.{number}"] = core
                        pieces[number] = pieces[number].replace(core, SLOT.format(index, number), 1)
                content = "".join(pieces)
            shapes.append({"role": message["role"], "content": content})
        return shapes, said

    def _plan(self, shapes: Messages) -> "_Plan":
        """Where the supervised part of each assistant turn begins and ends, as offsets into the template's own text.

        Raises _Problem if that is not certain.
        """
        literals, slots = _split(self._render(shapes))
        turns = []
        for index, shape in enumerate(shapes):
            if shape["role"] != "assistant":
                continue
            shown = [place for place, slot in enumerate(slots) if slot.startswith(f"{index}.")]
            if not shown:
                raise _Problem(f"does not show messages[{index}] (assistant)")
            first, last = shown[0], shown[-1] + 1
            if len(set(slots[first:last])) != len(shown) or len(shown) != last - first:
                raise _Problem(f"shows messages[{index}] (assistant) more than once or in pieces")
            prompt, before = _split(self._render(shapes[:index], add_generation_prompt=True))
            if before[-1:] != slots[:first][-1:]:
                raise _Problem(f"does not show messages[{index}] (assistant) where its generation prompt puts it")
            start = _shared(prompt[-1], literals[first])
            end = self._end(shapes[: index + 1], literals[last], is_last=index + 1 == len(shapes))
            turns.append((first, start, last, end))
        return _Plan(literals, slots, turns)

    def _end(self, shapes: Messages, follows: str, is_last: bool) -> int:
        """How much of what follows the content of the last message here ends its turn: through the special tokens.

            the conversation ends here    <|end|>\\n<|endoftext|>
            someone else goes on          <|end|>\\n<|user|>\\n         the turn ends by what both share: <|end|>

        Raises ModelError if there is no special token, as the model would never learn to stop.
        """
        index = len(shapes) - 1
        alone = follows if is_last else self._after(shapes, index)
        if not self.special.search(alone):
            raise ModelError(
                f"{self.name}: the chat template ends the assistant's turn with {alone!r}, which holds no special "
                "token, so the model would never learn to stop; use a template that ends turns with eos_token."
            )
        if is_last:
            try:
                follows = self._after([*shapes, {"role": "user", "content": SLOT.format(index + 1, 0)}], index)
            except _Problem:
                follows = alone
        shared = len(commonprefix([alone, follows]))
        ends = [match.end() for match in self.special.finditer(alone)]
        both = [end for end in ends if end <= shared]
        if not both and not is_last:
            raise _Problem(f"ends messages[{index}] (assistant) with {follows!r}, but with {alone!r} if nothing follows")
        return (both or ends)[-1]

    def _after(self, shapes: Messages, index: int) -> str:
        """The template's own text after the content of a message."""
        literals, slots = _split(self._render(shapes))
        places = [place for place, slot in enumerate(slots) if slot.startswith(f"{index}.")]
        if not places:
            raise _Problem(f"does not show messages[{index}] (assistant) when it comes last")
        return literals[places[-1] + 1]

    def _mask(self, text: str, spans: list[Span], ids: list[int], offsets: list[Span]) -> list[int]:
        """1 on the tokens that begin in a span; raises _Problem if these do not decode to what stands there."""
        mask = [0] * len(ids)
        for start, end in spans:
            first, last = bisect_left(offsets, (start,)), bisect_left(offsets, (end,))
            turn = ids[first:last]
            if not turn or turn[-1] not in self.special_ids:
                raise _Problem(f"ends a turn with {text[start:end][-20:]!r}, which its tokenizer does not keep apart")
            # A token before may hold the first bytes of the first character, and so straddle the start.
            begin = max(offsets[first][0], offsets[first - 1][1]) if first else 0
            self._check_decoded(turn, text[begin : offsets[last - 1][1]])
            mask[first:last] = [1] * len(turn)
        mask[0] = 0
        return mask

    def _check_decoded(self, turn: list[int], shown: str) -> None:
        decoded = self.tokenizer.backend_tokenizer.decode(turn, skip_special_tokens=False)
        if decoded == shown or self.tokenizer.unk_token_id in turn:
            return
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        if _bare(decoded, normalizer) != _bare(shown, normalizer):
            raise _Problem(f"shows {shown!r}, but the tokens there mean {decoded!r}")


class _Problem(Exception):
    """What a chat template does to a conversation, as the rest of a sentence; becomes a DataError with its source."""


@dataclass(frozen=True)
class _Plan:
    """The template's own text around the slots, and its supervised part per assistant turn.

    A turn is (literal, offset) of its start and (literal, offset) of its end:

        literals    ["U: ", "\\nA: ", "</s>"]    slots ["0.0", "1.0"]    turns [(1, 4, 2, 4)]
    """

    literals: list[str]
    slots: list[str]
    turns: list[tuple[int, int, int, int]]

    def spans(self, said: dict[str, str], text: str) -> list[Span] | None:
        """The supervised part of each turn of a text, or None if the text is not made by this plan."""
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


def _shared(prompt: str, rendered: str) -> int:
    """How much of the text before a content is the generation prompt, which the model is given.

        prompt                    rendered                                shared
        "<|assistant|>\\n"        "<|assistant|>\\n<think>\\n</think>"    "<|assistant|>\\n"
        "<|assistant|><think>"    "<|assistant|></think>"                 "<|assistant|>"

    Raises _Problem if the two part ways otherwise than by thinking that only the prompt opens.
    """
    shared = len(commonprefix([prompt, rendered]))
    if shared in (len(prompt), len(rendered)):
        return shared
    tag = rendered.rfind("<", 0, shared)
    if tag >= 0 and ">" not in rendered[tag:shared]:
        shared = tag
    if not THINKING_OPENED.fullmatch(prompt[shared:]):
        raise _Problem(f"writes {rendered!r} before the assistant's text, but its generation prompt is {prompt!r}")
    return shared


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that no text is made of: those flagged special, and eos."""
    flagged = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys(flagged + [tokenizer.eos_token] * bool(tokenizer.eos_token)))


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of the strings; nothing if there are none."""
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def _bare(text: str, normalizer: Any) -> str:
    """A text without what tokenizers change and decoders do not give back: white space and Unicode's spellings."""
    text = normalizer.normalize_str(text) if normalizer else text
    return "".join(unicodedata.normalize("NFKC", text).replace("\u2581", "").replace("\ufffd", "").split())
