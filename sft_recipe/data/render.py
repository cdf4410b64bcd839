"""Conversation + tokenizer -> token ids and loss mask, together."""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from sft_recipe.data.guard import MARK, Guard
from sft_recipe.data.messages import Conversation, located
from sft_recipe.data.plan import NotShown, Plan, Shape, Shaper, Turn, make_plan
from sft_recipe.data.template import Problem, Span, Template, special_tokens
from sft_recipe.data.tokens import TextTokenizer, Tokens
from sft_recipe.errors import DataError, ModelError

MAX_PLANS = 1024


@dataclass(frozen=True)
class RenderOptions:
    """What is learnt of a conversation, and how it is shown; see conf/data/default.yaml."""

    train_on: Literal["all", "last"] = "all"
    train_on_reasoning: bool = True
    enable_thinking: bool | None = None
    allow_special_text: bool = False


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model sees it: per token its id, and 1 if it is trained.

    <|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> assistant \\n Yes <|im_end|> \\n
         0        0   0  0      0      0       0           0     0   1      1      0

    `has_special_text`: the data spells a special token somewhere, and was kept from becoming one.
    """

    input_ids: list[int]
    loss_mask: list[int]
    has_special_text: bool = False


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
    if "<|im_end|>" not in special_tokens(tokenizer):
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

    One whole rendering of a conversation is the truth. A second one, of its shape, shows where the template puts
    what: it holds for the conversation if it is the same text with its slots filled, and so for all of that shape.

    Raises ModelError for a tokenizer without offsets, for a template that cannot be used (see Template) and, on
    encoding, for one that ends the assistant's turns with no special token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        options: RenderOptions = RenderOptions(),  # noqa: B008  # frozen
    ):
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise ModelError(
                f"{self.name}: the slow tokenizer {type(tokenizer).__name__} does not say which text a token "
                "stands for, so that no mask can be made; use a fast one (tokenizer.json)."
            )
        self.tokenizer = tokenizer
        self.options = options
        self.template = Template(tokenizer, chat_template, options.enable_thinking)
        self.shaper = Shaper(self.template, guards_special=not options.allow_special_text)
        self.core = tokenizer.backend_tokenizer
        self.tokenize = TextTokenizer(self.core)
        self.guard = Guard(self.core, self.template.special, self.template.special_tokens)
        self.special_ids = {self.core.token_to_id(token) for token in self.template.special_tokens}
        self.plans: dict[tuple[str, ...], Plan] = {}

    def encode(self, conversation: Conversation) -> Encoded:
        """Token ids and mask of one conversation.

        Raises DataError, naming the source, where the template refuses the conversation or does not show all of
        it, or where what to train on cannot be located with certainty.
        """
        encoded = self.encode_batch([conversation])[0]
        if isinstance(encoded, DataError):
            raise encoded
        return encoded

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded | DataError]:
        """Token ids and masks, in order, tokenised together; the error in place of what cannot be encoded."""
        results: list[Any] = [self._tried(c, self._draw, c) for c in conversations]
        for is_guarded in (False, True):
            places = [n for n, item in enumerate(results) if isinstance(item, _Drawn) and item.is_guarded == is_guarded]
            if not places:
                continue
            tokenize = self.guard.tokenize if is_guarded else self.tokenize
            for place, tokens in zip(places, tokenize([results[place].text for place in places]), strict=True):
                results[place] = self._tried(conversations[place], self._mask, results[place], tokens)
        return results

    def _tried(self, conversation: Conversation, make: Callable[..., Any], *args: Any) -> Any:
        """What is made, or the DataError that names the source and the template."""
        try:
            return make(*args)
        except Problem as problem:
            error = located(conversation.source, f"the chat template of {self.name} {problem}", "template")
            error.__cause__ = problem
            return error

    def _draw(self, conversation: Conversation) -> "_Drawn":
        """The text of a conversation, and what to train on in it."""
        text, marks = self.template.render(self._dicts(conversation), conversation.tools)
        if self.template.is_marked and not marks:
            raise Problem("marks no token with {% generation %}")
        wanted = self._wanted(conversation)
        problem = "changes what the turns say"
        for keep_others in (False, True):
            shape = self.shaper.shape(conversation, keep_others)
            try:
                plan, begins = self._plan(shape, text)
                if plan:
                    return self._drawn(plan, begins, shape, text, marks, wanted)
            except NotShown:
                raise
            except Problem as error:
                problem = str(error)
        if self.template.is_marked and wanted is None and not self.shaper.has_special_text(shape):
            return _Drawn(text, marks)  # taken at its word
        raise Problem(
            f"{problem}, so that what to train on cannot be located with certainty; put {{% generation %}} "
            "marks around the assistant's part of the template, or use another one"
        )

    def _dicts(self, conversation: Conversation) -> list[dict[str, Any]]:
        dicts = conversation.as_dicts()
        key = self.template.reasoning_key
        for turn in dicts:
            if key != "reasoning_content" and "reasoning_content" in turn:
                turn[key] = turn.pop("reasoning_content")
        return dicts

    def _wanted(self, conversation: Conversation) -> set[int] | None:
        """The messages to train on, None for all that the assistant says."""
        turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
        chosen = turns[-1:] if self.options.train_on == "last" else turns
        wanted = {index for index in chosen if conversation.messages[index].train}
        return None if len(wanted) == len(turns) and self.options.train_on_reasoning else wanted

    def _plan(self, shape: Shape, text: str) -> tuple[Plan | None, list[int]]:
        """The plan of this shape, and where its literals begin in the text; none where it does not hold for it."""
        key = shape.key
        plan = self.plans.get(key)
        filled, begins = plan.fill(shape.said) if plan else ("", [])
        if plan is None or filled != text:  # not planned yet, or planned yesterday for a template that shows the date
            if len(self.plans) >= MAX_PLANS:
                self.plans.clear()
            plan = self.plans[key] = make_plan(self.template, shape)
            filled, begins = plan.fill(shape.said)
        return (plan if filled == text else None), begins

    def _drawn(
        self, plan: Plan, begins: list[int], shape: Shape, text: str, marks: list[Span], wanted: set[int] | None
    ) -> "_Drawn":
        if self.template.is_marked and marks != [plan.span(turn, begins) for turn in plan.turns]:
            raise Problem("marks something else with {% generation %} when other things are said")
        turns = plan.turns if wanted is None else self._chosen(plan.turns, wanted)
        if not self.shaper.has_special_text(shape):
            return _Drawn(text, [plan.span(turn, begins) for turn in turns])
        guarded, begins = plan.fill(shape.said, self.guard)
        tokens = [token for literal in plan.literals for token in self.template.special.findall(literal)]
        spans = [plan.span(turn, begins, self.guard) for turn in turns]
        return _Drawn(guarded, spans, [self.core.token_to_id(token) for token in tokens])

    def _chosen(self, turns: list[Turn], wanted: set[int]) -> list[Turn]:
        """The turns of these messages, without their thoughts where these are not learnt."""
        if any(turn.message is None for turn in turns):
            raise Problem("puts {% generation %} marks around several turns at once, so that none can be left out")
        chosen = [turn for turn in turns if turn.message in wanted]
        if self.options.train_on_reasoning:
            return chosen
        cut = [replace(turn, begin=max(turn.begin, turn.answer or turn.begin)) for turn in chosen]
        return [turn for turn in cut if turn.begin < turn.end]

    def _mask(self, drawn: "_Drawn", tokens: Tokens) -> Encoded:
        """1 on the tokens of each span; raises Problem if these do not mean what stands there."""
        ids = tokens.ids
        if drawn.is_guarded:
            ids = self.guard.ids(ids)
            if [number for number in ids if number in self.special_ids] != drawn.specials:
                raise Problem("is given data that spells a special token, which this tokenizer cannot keep apart")
        mask = [0] * len(ids)
        for start, end in drawn.spans:
            if self.template.is_marked:  # as transformers takes the marks: every token that has a part in them
                first, last = tokens.first_in(start), tokens.first_in(end - 1) + 1
            else:
                first, last = tokens.first_from(start), tokens.first_from(end)
                if first == last or ids[last - 1] not in self.special_ids:
                    raise Problem(f"ends a turn with {drawn.text[:end][-20:]!r}, which is not one token there")
                self._check_meaning(ids[first:last], tokens.shown(first, last))
            mask[first:last] = [1] * (last - first)
        mask[0] = 0
        return Encoded(ids, mask, drawn.is_guarded)

    def _check_meaning(self, turn: list[int], shown: str | None) -> None:
        """What a turn's tokens decode to must be what stands there, as far as that is not known already."""
        if shown is None or self.tokenizer.unk_token_id in turn:
            return
        meant = self.core.decode(turn, skip_special_tokens=False)
        if meant != shown and _bare(meant, self.core.normalizer) != _bare(shown, self.core.normalizer):
            raise Problem(f"shows {shown[:80]!r}, but the tokens there mean {meant[:80]!r}")


@dataclass(frozen=True)
class _Drawn:
    """A conversation's text and the spans to train on; `specials` are the ids that its template alone puts there.

    `specials` is there where the data spells special tokens: the text then has those of the template marked.
    """

    text: str
    spans: list[Span]
    specials: list[int] | None = None

    @property
    def is_guarded(self) -> bool:
        return self.specials is not None


def _bare(text: str, normalizer: Any) -> str:
    """A text without what tokenizers change and do not give back: white space and Unicode's ways to spell."""
    text = unicodedata.normalize("NFKC", normalizer.normalize_str(text) if normalizer else text)
    return "".join(text.translate(dict.fromkeys([0x2581, 0xFFFD, ord(MARK)])).split())
