"""Annotates conversations: renders them to text, and finds the spans of the text to train on."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from sft_recipe.data.messages import Conversation
from sft_recipe.data.rendering.chat_template import ChatTemplate, Refused, Span, TemplateError
from sft_recipe.data.rendering.escaping import SpecialTokenEscaper
from sft_recipe.data.rendering.inline_reasoning import has_inline_reasoning, with_reasoning_fields, writes_own_block
from sft_recipe.data.rendering.mask_plan import FilledPlan, MaskPlan, make_mask_plan
from sft_recipe.data.rendering.omissions import ContentOmitted
from sft_recipe.data.rendering.options import RenderOptions
from sft_recipe.data.rendering.skeleton import Skeleton, Skeletonizer
from sft_recipe.data.rendering.turns import Turn

MAX_PLANS = 1024
# The roles whose content a skeleton keeps, in the order of the attempts: most templates insert all texts unchanged,
# some write the results of tools as JSON, and a few inspect or change what users and system turns contain.
VERBATIM_ROLES: tuple[tuple[str, ...], ...] = ((), ("tool",), ("tool", "user", "system"))


@dataclass(frozen=True)
class AnnotatedText:
    """Holds a rendered conversation and the spans to train on, in characters.

    `special_ids` are the ids of the special tokens that the template inserts, in order, for a conversation whose data
    spells special tokens too. In that case the template's special tokens are escaped in `text`. Else it is None.
    `drops_reasoning`, `earlier_without_reasoning` and `omits_names` are those of Encoded.
    """

    text: str
    spans: list[Span]
    special_ids: list[int] | None = None
    drops_reasoning: bool = False
    earlier_without_reasoning: int = 0
    omits_names: bool = False

    @property
    def is_escaped(self) -> bool:
        """Return whether the template's special tokens are escaped in the text."""
        return self.special_ids is not None


class Annotator:
    """Makes annotated texts of conversations; keeps mask plans, by the key of their skeleton."""

    def __init__(self, template: ChatTemplate, options: RenderOptions, core: Tokenizer, escaper: SpecialTokenEscaper):
        self.template, self.options, self.core, self.escaper = template, options, core, escaper
        self.skeletonizer = Skeletonizer(template, escapes_special=not options.parse_special_tokens)
        self.plans: dict[tuple[str, ...], MaskPlan] = {}

    def annotate(self, conversation: Conversation) -> AnnotatedText:
        """Render a conversation and find the spans to train on.

        The rendering of the conversation is the reference: a mask plan is used only if, filled with the texts of the
        conversation, it equals that rendering. Raises TemplateError if no plan does, if its turns cannot be located, or
        if the template rejects the conversation.
        """
        if any(map(has_inline_reasoning, conversation.messages)) and self._writes_own_block:
            conversation = with_reasoning_fields(conversation)
        text, generation_spans = self._render(conversation)
        tagged = self.template.has_generation_tags
        if tagged and not generation_spans:
            raise TemplateError("has {% generation %} tags, but no text between them")
        supervised = self._supervised_messages(conversation)
        problem = ""
        for roles in VERBATIM_ROLES:
            skeleton = self.skeletonizer.skeleton(conversation, roles)
            try:
                filled = self._filled_plan(skeleton, text)
            except Refused:  # the template needs the texts themselves
                continue
            except ContentOmitted:
                raise
            except TemplateError as error:
                problem = str(error)
                break
            if filled is None:
                continue
            if not tagged or generation_spans == [filled.span(turn) for turn in filled.plan.turns]:
                return self._annotated(filled, skeleton, supervised)
            problem = "places its {% generation %} tags differently for other texts"
        if generation_spans and supervised is None and not self.skeletonizer.has_special_text(skeleton):
            return AnnotatedText(text, generation_spans)  # all that is tagged is trained on, so no plan is needed
        raise TemplateError(
            f"{problem or self._changed_text(conversation, text) or 'changes the texts of the turns'}, so the tokens "
            "to train on cannot be located with certainty; put {% generation %} and {% endgeneration %} around the "
            "assistant's part of the template, or use another template (model.chat_template)"
        )

    @cached_property
    def _writes_own_block(self) -> bool:
        return writes_own_block(self.template)

    def _render(self, conversation: Conversation) -> tuple[str, list[Span]]:
        messages = self._messages(conversation)
        try:
            return self.template.render(messages, conversation.tools)
        except Refused as error:
            if not self.template.accepts_folded_system(messages, conversation.tools):
                raise
            raise TemplateError(f"{error}; data.fold_system=true puts system turns into the user turns") from error

    def _messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        messages = conversation.as_dicts()
        key = self.template.reasoning_key
        for message in messages:
            if key != "reasoning_content" and "reasoning_content" in message:
                message[key] = message.pop("reasoning_content")
        return messages

    def _supervised_messages(self, conversation: Conversation) -> set[int] | None:
        """The indices of the messages to train on, None for all that the assistant produces."""
        turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
        selected = turns[-1:] if self.options.train_on == "last" else turns
        supervised = {index for index in selected if conversation.messages[index].train}
        return None if len(supervised) == len(turns) and self.options.train_on_reasoning else supervised

    def _filled_plan(self, skeleton: Skeleton, text: str) -> FilledPlan | None:
        """The plan of this skeleton, filled; None if it does not result in this text."""
        key = skeleton.key
        known = self.plans.get(key)
        filled = known.fill(skeleton.slot_texts) if known else None
        if filled and filled.rendered == text:
            return filled
        plan = make_mask_plan(self.template, skeleton, text)  # new, or outdated: some templates insert the date
        if plan is None:
            return None
        if len(self.plans) >= MAX_PLANS:
            self.plans.clear()
        self.plans[key] = plan
        return plan.fill(skeleton.slot_texts)

    def _annotated(self, filled: FilledPlan, skeleton: Skeleton, supervised: set[int] | None) -> AnnotatedText:
        plan, special_pattern = filled.plan, self.template.special_pattern
        turns = plan.turns if supervised is None else self._select(plan.turns, supervised)
        if problem := next((turn.problem for turn in turns if turn.problem), ""):
            raise TemplateError(problem)
        last = max(index for index, message in enumerate(skeleton.messages) if message["role"] == "assistant")
        earlier = (
            plan.without_reasoning - {last} if supervised is None else plan.without_reasoning & supervised - {last}
        )
        omitted = last in plan.without_reasoning, len(earlier), plan.omits_names
        special = [token for literal in plan.literals for token in special_pattern.findall(literal)]
        if self.options.parse_special_tokens or len(special) == len(special_pattern.findall(filled.text)):
            return AnnotatedText(filled.text, [filled.span(turn) for turn in turns], None, *omitted)
        escaped = plan.fill(skeleton.slot_texts, self.escaper)
        special_ids = [self.core.token_to_id(token) for token in special]
        return AnnotatedText(escaped.text, [escaped.span(turn) for turn in turns], special_ids, *omitted)

    def _select(self, turns: list[Turn], supervised: set[int]) -> list[Turn]:
        """The turns of these messages, without their reasoning where it is masked out."""
        if any(turn.message is None for turn in turns):
            raise TemplateError(
                "puts {% generation %} tags around several turns at once, so that no single turn can be left out of "
                "the loss"
            )
        selected = [turn for turn in turns if turn.message in supervised]
        if self.options.train_on_reasoning:
            return selected
        answers = [replace(turn, start=max(turn.start, turn.answer_start or turn.start)) for turn in selected]
        return [turn for turn in answers if turn.start < turn.end or turn.problem]

    def _changed_text(self, conversation: Conversation, text: str) -> str:
        """Names the first message that is not in the rendered text as it is in the conversation, "" if all are."""
        for slot, slot_text in self.skeletonizer.skeleton(conversation).slot_texts.items():
            if slot_text not in text:
                prefix = slot.partition(".")[0]
                return f"changes the text of {prefix if prefix == 'tools' else f'messages[{prefix}]'}"
        return ""
