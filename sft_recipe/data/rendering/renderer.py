"""Conversation + tokenizer -> token ids and loss mask, together."""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from sft_recipe.data.messages import Conversation, data_error
from sft_recipe.data.rendering.chat_template import Problem, Span, Template
from sft_recipe.data.rendering.escaping import MARK, SpecialTokenEscaper
from sft_recipe.data.rendering.mask_plan import MaskPlan, NotShown, Skeleton, Skeletonizer, Turn, make_mask_plan
from sft_recipe.data.rendering.text_tokens import TextTokenizer, Tokens
from sft_recipe.errors import DataError, ModelError

MAX_PLANS = 1024
# Whose words a shape keeps, the fewest first: some templates write what tools say as JSON, or look at what others say.
KEPT: tuple[tuple[str, ...], ...] = ((), ("tool",), ("tool", "user", "system"))


@dataclass(frozen=True)
class RenderOptions:
    """What is learnt of a conversation, and how it is shown; see conf/data/default.yaml."""

    train_on: Literal["all", "last"] = "all"
    train_on_reasoning: bool = True
    enable_thinking: bool | None = None
    parse_special_tokens: bool = False


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model sees it: per token its id, and 1 if it is trained.

    <|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> assistant \\n Yes <|im_end|> \\n
         0        0   0  0      0      0       0           0     0   1      1      0

    `has_special_text`: the data spells a special token somewhere, and was kept from becoming one. `drops_reasoning`:
    the template leaves out the reasoning of the last turn.
    """

    input_ids: list[int]
    loss_mask: list[int]
    has_special_text: bool = False
    drops_reasoning: bool = False


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
        self.skeletonizer = Skeletonizer(self.template, escapes_special=not options.parse_special_tokens)
        self.core = tokenizer.backend_tokenizer
        self.tokenize = TextTokenizer(self.core)
        self.escaper = SpecialTokenEscaper(self.core, self.template.special, self.template.special_tokens)
        self.special_ids = {self.core.token_to_id(token) for token in self.template.special_tokens}
        self.plans: dict[tuple[str, ...], MaskPlan] = {}

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
        results: list[Any] = [self._tried(c, self._render, c) for c in conversations]
        for is_escaped in (False, True):
            places = [
                n for n, item in enumerate(results) if isinstance(item, _Rendering) and item.is_escaped == is_escaped
            ]
            if not places:
                continue
            tokenize = self.escaper.tokenize if is_escaped else self.tokenize
            for place, tokens in zip(places, tokenize([results[place].text for place in places]), strict=True):
                results[place] = self._tried(conversations[place], self._mask, results[place], tokens)
        return results

    def _tried(self, conversation: Conversation, make: Callable[..., Any], *args: Any) -> Any:
        """What is made, or the DataError that names the source and the template."""
        try:
            return make(*args)
        except Problem as problem:
            error = data_error(conversation.source, f"the chat template of {self.name} {problem}", "template")
            error.__cause__ = problem
            return error

    def _render(self, conversation: Conversation) -> "_Rendering":
        """The text of a conversation, and what to train on in it."""
        text, marks = self.template.render(self._dicts(conversation), conversation.tools)
        if self.template.is_marked and not marks:
            raise Problem("marks no token with {% generation %}")
        supervised = self._supervised_messages(conversation)
        problem = ""
        for kept in KEPT:
            skeleton = self.skeletonizer.skeleton(conversation, kept)
            try:
                plan, begins = self._plan(skeleton, text)
                if plan:
                    return self._layout(plan, begins, skeleton, text, marks, supervised)
            except NotShown:
                raise
            except Problem as error:
                problem = str(error)
        if self.template.is_marked and supervised is None and not self.skeletonizer.has_special_text(skeleton):
            return _Rendering(text, marks)  # taken at its word
        changed = next(
            (
                name
                for name, slot_texts in self.skeletonizer.skeleton(conversation).slot_texts.items()
                if slot_texts not in text
            ),
            "",
        )
        if changed:
            problem = f"changes what messages[{changed.partition('.')[0]}] says"
        raise Problem(
            f"{problem or 'changes what the turns say'}, so that what to train on cannot be located with certainty; "
            "put {% generation %} marks around the assistant's part of the template, or use another one"
        )

    def _dicts(self, conversation: Conversation) -> list[dict[str, Any]]:
        dicts = conversation.as_dicts()
        key = self.template.reasoning_key
        for turn in dicts:
            if key != "reasoning_content" and "reasoning_content" in turn:
                turn[key] = turn.pop("reasoning_content")
        return dicts

    def _supervised_messages(self, conversation: Conversation) -> set[int] | None:
        """The messages to train on, None for all that the assistant says."""
        turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
        chosen = turns[-1:] if self.options.train_on == "last" else turns
        supervised = {index for index in chosen if conversation.messages[index].train}
        return None if len(supervised) == len(turns) and self.options.train_on_reasoning else supervised

    def _plan(self, skeleton: Skeleton, text: str) -> tuple[MaskPlan | None, list[int]]:
        """The plan of this shape, and where its literals begin in the text; none where it does not hold for it."""
        key = skeleton.key
        plan = self.plans.get(key)
        filled, begins = plan.fill(skeleton.slot_texts) if plan else ("", [])
        if plan is None or filled != text:  # not planned yet, or planned yesterday for a template that shows the date
            if len(self.plans) >= MAX_PLANS:
                self.plans.clear()
            plan = self.plans[key] = make_mask_plan(self.template, skeleton)
            filled, begins = plan.fill(skeleton.slot_texts)
        return (plan if filled == text else None), begins

    def _layout(
        self,
        plan: MaskPlan,
        begins: list[int],
        skeleton: Skeleton,
        text: str,
        marks: list[Span],
        supervised: set[int] | None,
    ) -> "_Rendering":
        if self.template.is_marked and marks != [plan.span(turn, begins) for turn in plan.turns]:
            raise Problem("marks something else with {% generation %} when other things are said")
        turns = plan.turns if supervised is None else self._chosen(plan.turns, supervised)
        own = [token for literal in plan.literals for token in self.template.special.findall(literal)]
        if self.options.parse_special_tokens or len(own) == len(self.template.special.findall(text)):
            return _Rendering(text, [plan.span(turn, begins) for turn in turns], None, plan.drops_reasoning)
        escaped, begins = plan.fill(skeleton.slot_texts, self.escaper)
        spans = [plan.span(turn, begins, self.escaper) for turn in turns]
        return _Rendering(escaped, spans, [self.core.token_to_id(token) for token in own], plan.drops_reasoning)

    def _chosen(self, turns: list[Turn], supervised: set[int]) -> list[Turn]:
        """The turns of these messages, without their thoughts where these are not learnt."""
        if any(turn.message is None for turn in turns):
            raise Problem("puts {% generation %} marks around several turns at once, so that none can be left out")
        chosen = [turn for turn in turns if turn.message in supervised]
        if self.options.train_on_reasoning:
            return chosen
        cut = [replace(turn, begin=max(turn.begin, turn.answer or turn.begin)) for turn in chosen]
        return [turn for turn in cut if turn.begin < turn.end]

    def _mask(self, rendering: "_Rendering", tokens: Tokens) -> Encoded:
        """1 on the tokens of each span; raises Problem if these do not mean what stands there."""
        ids = tokens.ids
        if rendering.is_escaped:
            ids = self.escaper.ids(ids)
            if [number for number in ids if number in self.special_ids] != rendering.specials:
                raise Problem("is given data that spells a special token, which this tokenizer cannot keep apart")
        mask = [0] * len(ids)
        for start, end in rendering.spans:
            if self.template.is_marked:  # as transformers takes the marks: every token that has a part in them
                first, last = tokens.first_in(start), tokens.first_in(end - 1) + 1
            else:
                first, last = tokens.first_from(start), tokens.first_from(end)
                if first == last or ids[last - 1] not in self.special_ids:
                    raise Problem(f"ends a turn with {rendering.text[:end][-20:]!r}, which is not one token there")
                self._check_meaning(ids[first:last], tokens.shown(first, last))
            mask[first:last] = [1] * (last - first)
        mask[0] = 0
        return Encoded(ids, mask, rendering.is_escaped, rendering.drops_reasoning)

    def _check_meaning(self, turn: list[int], shown: str | None) -> None:
        """What a turn's tokens decode to must be what stands there, as far as that is not known already."""
        if shown is None or self.tokenizer.unk_token_id in turn:
            return
        meant = self.core.decode(turn, skip_special_tokens=False)
        if meant != shown and _bare(meant, self.core.normalizer) != _bare(shown, self.core.normalizer):
            raise Problem(f"shows {shown[:80]!r}, but the tokens there mean {meant[:80]!r}")


@dataclass(frozen=True)
class _Rendering:
    """A conversation's text and the spans to train on; `specials` are the ids that its template alone puts there.

    `specials` is there where the data spells special tokens: the text then has those of the template marked.
    """

    text: str
    spans: list[Span]
    specials: list[int] | None = None
    drops_reasoning: bool = False

    @property
    def is_escaped(self) -> bool:
        return self.specials is not None


def _bare(text: str, normalizer: Any) -> str:
    """A text without what tokenizers change and do not give back: white space and Unicode's ways to spell."""
    text = unicodedata.normalize("NFKC", normalizer.normalize_str(text) if normalizer else text)
    return "".join(text.translate(dict.fromkeys([0x2581, 0xFFFD, ord(MARK)])).split())
