"""The token store holds the ids and mask of every example, tokenized once per machine and memory-mapped."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import transformers
from transformers import PreTrainedTokenizerBase

from sft_recipe.data.readers import suffix_of
from sft_recipe.data.remarks import Remarks
from sft_recipe.data.rendering.renderer import RenderOptions
from sft_recipe.files import update_digest

REPORT = "store.json"
IDS, MASK = "input_ids.bin", "loss_mask.bin"
ARRAYS = ("offsets", "supervised", "digests")
REJECTED = "rejected.jsonl"
DAMAGE = (OSError, ValueError, TypeError, LookupError, EOFError)  # raised on opening an incomplete or damaged store


@dataclass(frozen=True)
class StoreOptions:
    """StoreOptions decide a store's contents, besides files and tokenizer; they are part of its key."""

    format: str = "auto"
    max_length: int = 2048
    truncation: str = "drop"
    columns: Mapping[str, str] = field(default_factory=dict)
    on_bad_record: str = "error"
    render: RenderOptions = RenderOptions()


@dataclass
class StoreReport:
    """StoreReport counts what became of the records: examples, tokens, and bad records by kind (`rejected`).

    `longest` is the largest number of tokens of a record before truncation. `untokenized` records are surely too long,
    and may be longer than `longest`, which has the least number of tokens that they have. `digest` identifies ids and
    masks.
    """

    records: int = 0
    examples: int = 0
    too_long: int = 0
    untokenized: int = 0
    longest: int = 0
    without_target: int = 0
    special_text: int = 0
    dropped_reasoning: int = 0
    earlier_without_reasoning: int = 0
    tokens: int = 0
    supervised: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    examples_of_files: list[int] = field(default_factory=list)
    digest: str = ""
    remarks: Remarks = field(default_factory=Remarks)

    def add(self, other: "StoreReport") -> None:
        """Add the counts of another part of the records."""
        counts = (
            "records",
            "examples",
            "too_long",
            "untokenized",
            "without_target",
            "special_text",
            "tokens",
            "supervised",
        )
        for name in (*counts, "dropped_reasoning", "earlier_without_reasoning"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        for kind, count in other.rejected.items():
            self.rejected[kind] = self.rejected.get(kind, 0) + count
        self.remarks.merge(other.remarks)

    @property
    def longest_text(self) -> str:
        """Return `longest` as text: `9000`, or `more than 9000`."""
        return f"more than {self.longest}" if self.untokenized else f"{self.longest}"

    @property
    def rejected_kinds(self) -> str:
        """Return the counts of bad records by kind as text: `3 empty, 1 roles`."""
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.rejected.items()))


@dataclass(frozen=True)
class TokenStore:
    """A TokenStore gives access to the examples on disk by index.

    `lengths` and `supervised` are tokens per example, int64 of shape (examples,). `digests`, uint64 of the same shape,
    are equal where examples are equal. The bad records are in `rejected.jsonl` in the folder.
    """

    folder: Path
    report: StoreReport
    offsets: np.ndarray = field(repr=False)
    supervised: np.ndarray
    digests: np.ndarray
    _ids: np.ndarray = field(repr=False)
    _mask: np.ndarray = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Map a complete store into memory. Raises one of DAMAGE where the folder does not have one."""
        values = json.loads((folder / REPORT).read_text())
        report = StoreReport(**values | {"remarks": Remarks.from_dict(values["remarks"])})
        offsets, supervised, digests = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS)
        ids = np.memmap(folder / IDS, dtype=np.int32, mode="r")
        mask = np.memmap(folder / MASK, dtype=np.uint8, mode="r")
        is_complete = len(offsets) - 1 == len(supervised) == len(digests) == report.examples
        if not is_complete or not len(ids) == len(mask) == offsets[-1] == report.tokens:
            raise ValueError(f"{folder} is not a complete token store")
        return cls(folder, report, offsets, supervised, digests, ids, mask)

    def __len__(self) -> int:
        return len(self.supervised)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `input_ids` (int32) and `loss_mask` (uint8) of one example, both of shape (tokens,)."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self._ids[span], self._mask[span]

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each example, int64 of shape (examples,)."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """Return a digest of all ids and masks: equal for equal examples in equal order."""
        return self.report.digest


@dataclass(frozen=True)
class Examples:
    """Examples are a selection from a store, such as its training part.

    `numbers` are indices into the store, int64 of shape (examples,). A number may occur several times: an example
    that is trained on several times per epoch.
    """

    store: TokenStore
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.store[self.numbers[index]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each example, int64 of shape (examples,)."""
        return self.store.lengths[self.numbers]

    @property
    def fingerprint(self) -> str:
        """Return a digest that is equal for the same examples in the same order."""
        numbers = hashlib.blake2b(self.numbers.tobytes(), digest_size=8).hexdigest()
        return f"{self.store.fingerprint}-{numbers}"

    @cached_property
    def supervised(self) -> int:
        """Return the number of supervised tokens in all examples."""
        return int(self.store.supervised[self.numbers].sum())


def store_key(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, options: StoreOptions) -> str:
    """Return a digest of all that decides a store's contents: files, tokenizer, template, options and this code."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        update_digest(digest, path)
        digest.update(f"end of file, {suffix_of(path)}".encode())
    # The renderer has switched off truncation and padding of tokenizer.json, so that the key does not depend on them.
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    parts = [tokenizer.chat_template, tokenizer.special_tokens_map, asdict(options), transformers.__version__]
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    for module in sorted([*Path(__file__).parent.glob("*.py"), *Path(__file__).parent.glob("rendering/*.py")]):
        digest.update(module.read_bytes())
    return digest.hexdigest()
