"""Mask plans: where a chat template puts the texts of a skeleton, and which parts are trained on."""

from dataclasses import dataclass
from itertools import accumulate

from sft_recipe.data.rendering.chat_template import ChatTemplate, Span
from sft_recipe.data.rendering.escaping import SpecialTokenEscaper
from sft_recipe.data.rendering.omissions import check_omissions, omits_names
from sft_recipe.data.rendering.skeleton import Skeleton, split_at_slots
from sft_recipe.data.rendering.turns import Position, Turn, TurnLocator


@dataclass(frozen=True)
class MaskPlan:
    """Holds a template's literals, the slots between them, and the turns to train on.

    rendered skeleton   "U: [0.text0]\\nA: [1.text0]</s>"

    literals  ["U: ",           "\\nA: ",           "</s>"]
    slots            "0.text0",         "1.text0"
    turns     [Turn(message=1, start=(1, 4), end=(2, 4))]     from the end of "\\nA: " to the end of "</s>"

    `without_reasoning`: indices of the messages whose reasoning the template leaves out. `appended`: the stop token at
    the end of the last literal that the template does not render (see TurnLocator.appended). `omits_names`: the
    template leaves out the names of turns.
    """

    literals: list[str]
    slots: list[str]
    turns: list[Turn]
    without_reasoning: frozenset[int] = frozenset()
    appended: str = ""
    omits_names: bool = False

    def fill(self, slot_texts: dict[str, str], escaper: SpecialTokenEscaper | None = None) -> "FilledPlan":
        """Put texts into the slots; with an `escaper`, the special tokens in the literals are escaped."""
        literals = [escaper.escape(literal) for literal in self.literals] if escaper else self.literals
        pieces = [literals[0]]
        for slot, literal in zip(self.slots, literals[1:], strict=True):
            pieces += slot_texts.get(slot, ""), literal
        starts = list(accumulate(map(len, pieces), initial=0))
        return FilledPlan(self, "".join(pieces), starts[:-1:2], escaper)


@dataclass(frozen=True)
class FilledPlan:
    """Holds a mask plan with texts in its slots; `literal_starts` are offsets of the literals, in characters."""

    plan: MaskPlan
    text: str
    literal_starts: list[int]
    escaper: SpecialTokenEscaper | None = None

    @property
    def rendered(self) -> str:
        """Return the part of the text that the template renders."""
        return self.text.removesuffix(self.plan.appended)

    def span(self, turn: Turn) -> Span:
        """Return the characters of the text that are trained on in a turn."""
        return self._offset(turn.start), self._offset(turn.end)

    def _offset(self, position: Position) -> int:
        index, offset = position
        added = self.escaper.added_length(self.plan.literals[index], offset) if self.escaper else 0
        return self.literal_starts[index] + offset + added


def make_mask_plan(template: ChatTemplate, skeleton: Skeleton, text: str) -> MaskPlan | None:
    """Find out what to train on by rendering a skeleton; returns None if its texts, filled in, do not give `text`.

    Raises Refused if the template rejects the skeleton, TemplateError if a turn cannot be located with certainty,
    ContentOmitted if the template leaves out a part of the conversation, and ModelError if an assistant turn ends
    without a special token.
    """
    rendered, generation_spans = template.render(skeleton.messages, skeleton.tools)
    literals, slots = split_at_slots(rendered)
    if MaskPlan(literals, slots, []).fill(skeleton.slot_texts).text != text:
        return None
    without_reasoning = check_omissions(template, skeleton, rendered, slots)
    locator = TurnLocator(template, skeleton, literals, slots)
    no_names = omits_names(template, skeleton, rendered)
    if template.has_generation_tags:
        turns = locator.tagged_turns(generation_spans)
        return MaskPlan(literals, slots, turns, without_reasoning, omits_names=no_names)
    turns = locator.assistant_turns()
    appended = locator.appended(turns)
    return MaskPlan([*literals[:-1], literals[-1] + appended], slots, turns, without_reasoning, appended, no_names)
