"""Writes the page of docs/ about published chat templates."""

import re
from collections import Counter, defaultdict

from benchmarks.results import table
from benchmarks.templates.judge import EXACT, KINDS, NOT_LOCATED, OMITTED, REFUSED, WRONG, Outcome
from benchmarks.templates.shapes import SHAPES
from benchmarks.templates.sources import PACKAGES

NAMED = 3  # templates per reason
Outcomes = dict[str, dict[str, Outcome]]


def page(outcomes: Outcomes) -> str:
    """Return the page of docs/ about these outcomes."""
    packages = ", ".join(f"{name} {version}" for name, version in PACKAGES.items())
    exact = sum(all(o.kind == EXACT for o in kinds.values()) for kinds in outcomes.values())
    sections = [
        f"""# Chat templates

{len(outcomes)} published chat templates, each with {len(SHAPES)} shapes of conversations: which can be trained on, and
why the others are refused. `python -m benchmarks.chat_templates` writes this page; the templates are those of the
packages {packages}.

Every text of a conversation consists of words that occur nowhere else. An oracle that does not use the renderer looks
for them among the tokens: the ids are those of `apply_chat_template` (and an appended stop token, where nothing ends
the last turn), every word of a system, user or tool turn has no loss, every word of a supervised assistant turn has
loss, and so has the token that ends the turn, but no header. A template with `{{% generation %}}` tags has the mask
of transformers. The tokenizers are small ones with the markers of the template as special tokens. {exact} templates
are exact in all shapes.""",
        "## By shape",
        _by_shape(outcomes),
        """*Refused by the template*: its own rendering fails. *Omitted*: it leaves out a part of the conversation, as
transformers' rendering confirms. *No end token*: the assistant's turn ends without one; the marker of the next role
counts as one. *Not located*: the generation prompt, or the end of a turn, differs from the conversation.""",
    ]
    for kind in (WRONG, NOT_LOCATED, OMITTED, REFUSED):
        sections += [f"## {kind.capitalize()}", _by_reason(outcomes, kind)]
    return "\n\n".join(sections) + "\n"


def _by_shape(outcomes: Outcomes) -> str:
    rows = []
    for shape in SHAPES:
        counts = Counter(kinds[shape].kind for kinds in outcomes.values())
        rows.append([shape, *(str(counts[kind]) for kind in KINDS)])
    total = Counter(o.kind for kinds in outcomes.values() for o in kinds.values())
    rows.append(["all", *(str(total[kind]) for kind in KINDS)])
    return table(["conversation", *KINDS], rows)


def _by_reason(outcomes: Outcomes, kind: str) -> str:
    found: dict[str, list[str]] = defaultdict(list)
    for name, kinds in outcomes.items():
        for outcome in kinds.values():
            if outcome.kind == kind:
                found[_general(outcome.reason)].append(name)
    rows = []
    for reason, names in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])):
        different = list(dict.fromkeys(names))
        some = ", ".join(different[:NAMED]) + (f" and {len(different) - NAMED} more" if len(different) > NAMED else "")
        rows.append([reason, str(len(names)), some])
    return table(["reason", "conversations", "templates"], rows) if rows else "None."


def _general(reason: str) -> str:
    """The reason without what is particular to a template, fit for a cell of a table."""
    text = re.sub(r"(has the generation prompt) .*", r"\1, but begins the turn otherwise", reason, flags=re.DOTALL)
    text = re.sub(r"(ends .* \(assistant\)) with .*( only when it is)", r"\1\2", text, flags=re.DOTALL)
    text = re.sub(r"messages\[\d+\]", "messages[N]", text)
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("*", "&#42;"), ("_", "&#95;")):
        text = text.replace(char, entity)
    return " ".join(text.split())[:160]
