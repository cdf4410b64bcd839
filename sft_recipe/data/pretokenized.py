"""Reads records that hold token ids instead of text: the format `tokens`, which is trained on as it stands."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft_recipe.data.messages import Message, data_error, json_type
from sft_recipe.data.turns import Record, is_null, parse_json
from sft_recipe.language import plural

NO_LOSS = -100  # the label of a token that is context
MASKS = ("loss_mask", "attention_mask")
LARGEST_ID = 2**31 - 1  # the token store has ids in 32 bits


@dataclass(frozen=True)
class TokenizedRecord:
    """A TokenizedRecord has token ids and, for each, 1 if it is supervised and 0 if it is context.

    `source` and `unread` are those of a Conversation; it has no `messages`.
    """

    input_ids: list[int]
    loss_mask: list[int]
    source: str = ""
    unread: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()

    @property
    def size(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)

    def as_record(self) -> dict[str, Any]:
        """Return the record in the format `tokens`, with a mask."""
        return {"input_ids": self.input_ids, "loss_mask": self.loss_mask}


def tokenized_record(
    record: Record, source: str, unread: tuple[str, ...] = (), is_encoder_decoder: bool = False
) -> TokenizedRecord:
    """Return the tokens of a record.

        causal           input_ids 5 6 7 8   labels -100 -100 7 8   ->  ids 5 6 7 8       mask 0 0 1 1
        causal           input_ids 5 6 7 8   loss_mask  0  0  1 1   ->  the same
        encoder-decoder  input_ids 5 6       labels     7  8  9     ->  ids 5 6 7 8 9     mask 0 0 1 1 1

    A causal model's labels are not shifted: each is -100 or the id at its place. Those of an encoder-decoder model are
    the target, which follows the source; -100 may only pad its end. Raises DataError, beginning with `source`, for
    anything else.
    """
    ids = _numbers(record, "input_ids", source)
    _check_ids(ids, "input_ids", source)
    _check_not_padded(record, source)
    if is_encoder_decoder:
        target = _target(record, source)
        return TokenizedRecord(ids + target, [0] * len(ids) + [1] * len(target), source, unread)
    return TokenizedRecord(ids, _loss_mask(record, ids, source), source, unread)


def check_vocabulary(record: TokenizedRecord, size: int) -> None:
    """Raise DataError where a token has an id that a vocabulary of `size` ids does not have."""
    if (largest := max(record.input_ids)) >= size:
        raise data_error(
            record.source,
            f"the token id {largest} is not in the vocabulary, which ends at {size - 1}; name the tokenizer that the "
            "data was made with (TOKENIZER_PATH)",
        )


def check_no_padding(record: TokenizedRecord, pad_id: int | None, eos_id: int | None, has_targets: bool) -> None:
    """Raise DataError where a text begins or ends with pad tokens, which a model would learn.

    One may end it where that is what ends texts: it is eos as well, or a causal model learns it.
    """
    if pad_id is None:
        return
    ids, supervised = record.input_ids, record.loss_mask
    begin = supervised.count(0) if has_targets else 0  # of the labels
    may_end = pad_id == eos_id or (not has_targets and bool(supervised[-1]))
    texts = {"input_ids": ids[:begin], "labels": ids[begin:]} if has_targets else {"input_ids": ids}
    for name, text in texts.items():
        before, after = _repeated(text, pad_id), _repeated(text[::-1], pad_id)
        if before > 1 or after > may_end:
            place, count = ("begins", before) if before > 1 else ("ends", after)
            raise data_error(
                record.source,
                f"{name} {place} with {plural(count, 'pad token')} (id {pad_id}); remove the padding",
            )


def _repeated(ids: Sequence[int], token: int) -> int:
    """The number of times that ids begin with a token."""
    return next((place for place, value in enumerate(ids) if value != token), len(ids))


def _loss_mask(record: Record, ids: list[int], source: str) -> list[int]:
    has_labels = not is_null(record.get("labels"))
    if has_labels == (not is_null(record.get("loss_mask"))):
        count = "both" if has_labels else "neither"
        raise data_error(source, f"{count} labels and loss_mask are given beside input_ids; expected one of them")
    name = "labels" if has_labels else "loss_mask"
    values = _numbers(record, name, source)
    if len(values) != len(ids):
        problem = f"{name} has {plural(len(values), 'value')}, but input_ids has {len(ids)}; expected as many"
        raise data_error(source, problem)
    context = NO_LOSS if has_labels else 0
    for place, (value, token) in enumerate(zip(values, ids, strict=True)):
        supervised = token if has_labels else 1
        if value not in (context, supervised):
            expected = f"{context}, or {supervised}{' as in input_ids (labels are not shifted)' if has_labels else ''}"
            raise data_error(source, f"{name}[{place}] is {value}; expected {expected}")
    if values[0] != context:
        raise data_error(
            source, f"{name}[0] is {values[0]}; expected {context}, since nothing predicts the first token"
        )
    return [int(value != context) for value in values]


def _target(record: Record, source: str) -> list[int]:
    if is_null(record.get("labels")):
        raise data_error(source, "labels are missing beside input_ids; expected the ids of the target")
    target = _numbers(record, "labels", source)
    while target and target[-1] == NO_LOSS:
        target.pop()
    if not target:
        raise data_error(source, "labels has no token; expected the ids of the target", "empty")
    _check_ids(target, "labels", source)
    return target


def _check_ids(ids: list[int], name: str, source: str) -> None:
    for place, value in enumerate(ids):
        if not 0 <= value <= LARGEST_ID:
            raise data_error(source, f"{name}[{place}] is {value}; expected a token id, 0 to {LARGEST_ID}")


def _numbers(record: Record, name: str, source: str) -> list[int]:
    """Return a field's whole numbers, which may be given as JSON (in a CSV cell); true is 1 in a mask."""
    values = parse_json(record[name], name, source)
    if not isinstance(values, list):
        raise data_error(source, f"{name} is {json_type(values)}; expected a list of whole numbers", "type")
    if not values:
        raise data_error(source, f"{name} is an empty list; remove the record", "empty")
    for place, value in enumerate(values):
        if not isinstance(value, int) or (isinstance(value, bool) and name not in MASKS):
            raise data_error(source, f"{name}[{place}] is {_shown(value)}; expected a whole number", "type")
    return [int(value) for value in values]


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, float) else json_type(value)


def _check_not_padded(record: Record, source: str) -> None:
    """Padding is not stored: documents are packed, and a pad token in front of a text would change its positions."""
    if is_null(record.get("attention_mask")):
        return
    mask: Sequence[int] = _numbers(record, "attention_mask", source)
    if not all(mask):
        raise data_error(source, f"attention_mask[{mask.index(0)}] is 0: the record is padded; remove the padding")
