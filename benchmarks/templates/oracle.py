"""Judges ids and mask of a conversation by the words of its turns alone.

The renderer fills the slots of a skeleton. The oracle knows no skeleton: it renders with transformers, spells the
tokens out, and finds each word of each turn in the text.
"""

import json
import re
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from benchmarks.templates.shapes import Builder
from benchmarks.templates.vocabulary import ENDS, MARKER
from sft_recipe.data.rendering.renderer import Encoded

BYTES = {char: byte for byte, char in bytes_to_unicode().items()}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
INLINE = re.compile(r"<think>\n(.*?)\n</think>\n\n(.*)", re.DOTALL)
WORD = re.compile("zq[a-z]{3}")
END = re.compile("|".join(map(re.escape, sorted(ENDS, key=len, reverse=True))))
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
HEADER = re.compile(r"\b(assistant|model)\b", re.IGNORECASE)
CLOSED_REASONING = re.compile(r"</[\w:]*think")

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Spelled:
    """Holds tokens as text; `trained[i]` is the loss mask of the token in which character i begins."""

    text: str
    trained: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> "Spelled":
        """Return the text of the ids and the mask of each character."""
        data, mask = bytearray(), []
        for number, flag in zip(encoded.input_ids, encoded.loss_mask, strict=True):
            token = str(tokenizer.convert_ids_to_tokens(number))
            is_added = number in tokenizer.added_tokens_decoder
            piece = token.encode() if is_added else bytes(BYTES[char] for char in token)
            data += piece
            mask += [flag] * len(piece)
        text, starts = data.decode(), [0]
        for char in text[:-1]:
            starts.append(starts[-1] + len(char.encode()))
        return cls(text, [mask[start] for start in starts])

    def run(self, position: int) -> tuple[int, int]:
        """Return the start of the unbroken training that ends at or after this position, and its end."""
        start = end = position
        while start and self.trained[start - 1]:
            start -= 1
        while end < len(self.text) and self.trained[end]:
            end += 1
        return start, end

    def runs(self) -> list[tuple[int, int]]:
        """Return the spans of unbroken training."""
        starts = [i for i, flag in enumerate(self.trained) if flag and not (i and self.trained[i - 1])]
        return [self.run(start) for start in starts]


@dataclass(frozen=True)
class Oracle:
    """Judges one conversation in the chat template of a tokenizer of benchmarks/templates/vocabulary.py."""

    tokenizer: PreTrainedTokenizerBase
    chat: Builder

    @cached_property
    def references(self) -> dict[str, list[int]]:
        """Return texts and ids by transformers, for each spelling of the conversation that the template renders."""
        return self._rendered(self.chat.conversation().as_dicts())

    def _rendered(self, turns: Messages) -> dict[str, list[int]]:
        found = {}
        for messages in _spellings(turns):
            try:
                text = self._render(messages)
            except Exception:
                continue  # the template refuses it
            found[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def problems(self, encoded: Encoded) -> list[str]:
        """Return what is wrong with ids and mask, [] if nothing is."""
        if GENERATION.search(self.tokenizer.chat_template):
            return self._tag_problems(encoded)
        spelled = Spelled.of(self.tokenizer, encoded)
        found = ["the first token is trained"] * encoded.loss_mask[0]
        text, appended = self._without_stop_token(spelled.text)
        ids = encoded.input_ids[:-1] if appended else encoded.input_ids
        if text not in self.references:
            found.append("the text is not that of transformers")
        elif self.references[text] != ids and not encoded.has_special_text:
            found.append("the ids are not those of transformers")
        if any(not WORD.search(spelled.text[start:end]) for start, end in spelled.runs()):
            found.append("tokens without words are trained")
        return found + self._word_problems(spelled, encoded) + self._turn_problems(spelled)

    def _without_stop_token(self, text: str) -> tuple[str, str]:
        """The text, and the stop token that is appended to one that the template does not end with any."""
        for reference in self.references:
            appended = text.removeprefix(reference)
            if appended != text and appended and (MARKER.fullmatch(appended) or appended == self.tokenizer.eos_token):
                return reference, appended
        return text, ""

    def is_complete(self, text: str) -> bool:
        """Return whether a text contains all words of the conversation."""
        return all(word in text for word in self.chat.message_of)

    def is_missing(self, part: str) -> bool:
        """Return whether a part is not rendered: `tools`, or `messages[2].content` and the like."""
        match = re.search(r"messages\[(\d+)\]\.(\w+)", part)
        if match and match[2] == "tool_calls":
            return self._ignores_name(int(match[1]))
        words = [word for word, index in self.chat.message_of.items() if index == (int(match[1]) if match else None)]
        if match:
            words = [word for word in words if (word in self.chat.reasoning) == (match[2] == "reasoning")]
        if match and match[2] == "reasoning":
            return not any(word in text for text in self._texts_with_fields for word in words)
        return not all(word in text for text in self.references for word in words)

    def _ignores_name(self, index: int) -> bool:
        """Whether the name of one of the called tools does not matter in any spelling."""
        for number in range(len(self.chat.messages[index].tool_calls)):
            turns = deepcopy(self.chat.conversation().as_dicts())
            turns[index]["tool_calls"][number]["function"]["name"] = "another_tool"
            if not set(self.references) - set(self._rendered(turns)):
                return True
        return False

    def _render(self, messages: Messages, **options: Any) -> str:
        tools: Any = list(self.chat.offered) or None
        return str(self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options))

    def _tag_problems(self, encoded: Encoded) -> list[str]:
        """The mask is that of transformers, where all turns are supervised and no text spells a special token."""
        if len(self._supervised) < sum(m.role == "assistant" for m in self.chat.messages) or encoded.has_special_text:
            return []
        tools: Any = list(self.chat.offered) or None
        for messages in _spellings(self.chat.conversation().as_dicts()):
            try:
                own: Any = self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    return_dict=True,
                    return_assistant_tokens_mask=True,
                )
            except Exception:
                continue
            if own["input_ids"] == encoded.input_ids and own["assistant_masks"][1:] == encoded.loss_mask[1:]:
                return []
        return ["the mask is not that of transformers"]

    @property
    def _supervised(self) -> list[int]:
        return [i for i, message in enumerate(self.chat.messages) if message.role == "assistant" and message.train]

    def _word_problems(self, spelled: Spelled, encoded: Encoded) -> list[str]:
        """Each word is trained exactly if its turn is, and present, except reasoning of earlier turns."""
        found = []
        for match in WORD.finditer(spelled.text):
            index = self.chat.message_of[match[0]]
            # The first character may share a token with the header.
            if set(spelled.trained[match.start() + 1 : match.end()]) != {int(index in self._supervised)}:
                found.append(f"wrong mask in messages[{index}]")
        optional = {i for i in self._supervised if encoded.drops_reasoning or i != self._supervised[-1]}
        for word, index in self.chat.message_of.items():
            if word not in spelled.text and not (word in self.chat.reasoning and index in optional):
                found.append(f"words of messages[{index}] are missing")
        return sorted(set(found))

    def _turn_problems(self, spelled: Spelled) -> list[str]:
        """Each turn begins without its header, and ends with the first end token after its last word."""
        found = []
        for index in self._supervised:
            words = [match for match in WORD.finditer(spelled.text) if self.chat.message_of[match[0]] == index]
            if not words:
                found.append(f"messages[{index}] is missing")
                continue
            first, last = words[0].start(), words[-1].end()
            (start, _), (_, stop), has_prompt = spelled.run(first), spelled.run(last), self._has_prompt(index)
            end = self._end(spelled, last)
            if not all(spelled.trained[first + 1 : end]) or not self._may_go_on(spelled.text[end:stop], has_prompt):
                found.append(f"messages[{index}] ends with {spelled.text[last:stop]!r}")
            before = spelled.text[start:first]
            if has_prompt and HEADER.search(before) and not END.search(before):
                found.append(f"messages[{index}] begins with {before!r}")
            if CLOSED_REASONING.search(before) and words[0][0] in self.chat.reasoning and self._shows_field:
                found.append(f"messages[{index}] has empty reasoning before its reasoning")
        return found

    @cached_property
    def _texts_with_fields(self) -> list[str]:
        """The conversation with all reasoning in its field, rendered."""
        return list(self._rendered([_lifted(turn) for turn in self.chat.conversation().as_dicts()]))

    @property
    def _shows_field(self) -> bool:
        return any(word in text for text in self._texts_with_fields for word in self.chat.reasoning)

    def _end(self, spelled: Spelled, last: int) -> int:
        """Where a turn ends: after an end token, and after eos if that follows and is trained."""
        following = WORD.search(spelled.text, last)
        limit = following.start() if following else len(spelled.text)
        token = END.search(spelled.text, last, limit) or MARKER.search(spelled.text, last, limit)
        end = token.end() if token else limit
        eos = re.compile(rf"\s*{re.escape(self.tokenizer.eos_token)}").match(spelled.text, end)
        return eos.end() if eos and spelled.trained[eos.end() - 1] else end

    def _may_go_on(self, after: str, has_prompt: bool) -> bool:
        """After a turn's end only the next turn is trained, at once, or with a header that no prompt has."""
        return not after or WORD.match(after.strip()) is not None or (not has_prompt and bool(WORD.search(after)))

    def _has_prompt(self, index: int) -> bool:
        """Whether there is a generation prompt before a turn; without one the model must write the header itself."""
        turns = self.chat.conversation().as_dicts()[:index] or [{"role": "user", "content": "Hi"}]
        try:
            return self._render(turns) != self._render(turns, add_generation_prompt=True)
        except Exception:
            return True


def _spellings(plain: Messages) -> list[Messages]:
    """The messages, for each name and place of the reasoning, and for arguments as objects and as JSON text."""
    variants = [plain]
    if any(INLINE.match(turn["content"]) for turn in plain):
        variants.append([_lifted(turn) for turn in plain])
    variants = [
        [{key if name == "reasoning_content" else name: value for name, value in turn.items()} for turn in turns]
        for turns in variants
        for key in REASONING_KEYS
    ]
    if any("tool_calls" in turn for turn in plain):
        variants += [[_json_arguments(turn) for turn in turns] for turns in variants]
    return variants


def _lifted(turn: dict[str, Any]) -> dict[str, Any]:
    inline = INLINE.match(turn["content"])
    return {**turn, "reasoning_content": inline[1], "content": inline[2]} if inline else turn


def _json_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in turn:
        return turn
    functions = [call["function"] for call in turn["tool_calls"]]
    functions = [{**function, "arguments": json.dumps(function["arguments"])} for function in functions]
    calls = [{**call, "function": function} for call, function in zip(turn["tool_calls"], functions, strict=True)]
    return {**turn, "tool_calls": calls}
