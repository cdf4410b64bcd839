"""The token store holds the ids and mask of every example, tokenized once per machine and memory-mapped."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_128

from sft_recipe.data.readers import suffix_of
from sft_recipe.data.remarks import Remarks
from sft_recipe.data.rendering.renderer import RenderOptions
from sft_recipe.files import digest, update_digest

REPORT = "store.json"
IDS, MASK = "input_ids.bin", "loss_mask.bin"
ARRAYS = ("offsets", "supervised", "digests", "groups")
REJECTED = "rejected.jsonl"
# Modules of this package that change nothing in a store: a new version of them leaves stores usable.
NOT_IN_STORES = {"batching", "notices", "parquet_writer", "quality", "remote", "render", "run_inputs", "sources"}
NOT_IN_STORES |= {"statistics", "store_eviction", "worker_pool"}
DAMAGE = (OSError, ValueError, TypeError, LookupError, EOFError)  # raised on opening an incomplete or damaged store


@dataclass(frozen=True)
class StoreOptions:
    """StoreOptions decide a store's contents, besides files and tokenizer; they are part of its key.

    With `max_target_length` an example is a source of up to `max_length` tokens and a target, for an encoder-decoder
    model whose decoder reads `decoder_start_id` first.
    """

    format: str = "auto"
    max_length: int = 2048
    max_target_length: int | None = None
    decoder_start_id: int | None = None
    max_chars: int | None = None
    truncation: str = "drop"
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    on_bad_record: str = "error"
    render: RenderOptions = RenderOptions()
    split_turns: bool = False

    @property
    def has_targets(self) -> bool:
        """Return whether an example is a source and a target."""
        return self.max_target_length is not None


@dataclass
class StoreReport:
    """StoreReport counts what became of the records: examples, tokens, and bad records by kind (`rejected`).

    `longest` is the largest number of tokens of a record, or of its source, before truncation, `longest_target` that of
    its target. `untokenized` records are surely too long,
    and may be longer than `longest`, which has the least number of tokens that they have. `digest` identifies ids and
    masks.
    """

    records: int = 0
    examples: int = 0
    too_long: int = 0
    untokenized: int = 0
    longest: int = 0
    longest_target: int = 0
    without_target: int = 0
    special_text: int = 0
    dropped_reasoning: int = 0
    earlier_without_reasoning: int = 0
    joined_starts: int = 0
    tokens: int = 0
    supervised: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    examples_of_files: list[int] = field(default_factory=list)
    digest: str = ""
    remarks: Remarks = field(default_factory=Remarks)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StoreReport":
        """Return the report that `asdict` turned into these values. Raises TypeError or LookupError for others."""
        return cls(**values | {"remarks": Remarks.from_dict(values["remarks"])})

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
        for name in (*counts, "dropped_reasoning", "earlier_without_reasoning", "joined_starts"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.longest_target = max(self.longest_target, other.longest_target)
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
    are equal where examples are equal; `groups` likewise for examples that must not be on both sides of a split. The
    bad records are in `rejected.jsonl` in the folder.
    """

    folder: Path
    report: StoreReport
    offsets: np.ndarray = field(repr=False)
    supervised: np.ndarray
    digests: np.ndarray
    groups: np.ndarray
    _ids: np.ndarray = field(repr=False)
    _mask: np.ndarray = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Map a complete store into memory. Raises one of DAMAGE where the folder does not have one."""
        report = StoreReport.from_dict(json.loads((folder / REPORT).read_text()))
        offsets, supervised, digests, groups = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS)
        ids = np.memmap(folder / IDS, dtype=np.int32, mode="r")
        mask = np.memmap(folder / MASK, dtype=np.uint8, mode="r")
        is_complete = len(offsets) - 1 == len(supervised) == len(digests) == len(groups) == report.examples
        if not is_complete or not len(ids) == len(mask) == offsets[-1] == report.tokens:
            raise ValueError(f"{folder} is not a complete token store")
        return cls(folder, report, offsets, supervised, digests, groups, ids, mask)

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
        return f"{self.store.fingerprint}-{digest(self.numbers.tobytes())}"

    @cached_property
    def source_lengths(self) -> np.ndarray:
        """Return the unsupervised tokens of each example, int64 of shape (examples,): an encoder-decoder's source."""
        return self.lengths - self.store.supervised[self.numbers]

    def longest_sequence(self, has_targets: bool) -> int:
        """Return the most tokens of an example; where examples have targets, of a source or a target."""
        lengths = self.lengths
        return int(
            max(self.source_lengths.max(), (lengths - self.source_lengths).max()) if has_targets else lengths.max()
        )

    @cached_property
    def supervised(self) -> int:
        """Return the number of supervised tokens in all examples."""
        return int(self.store.supervised[self.numbers].sum())


def store_key(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, options: StoreOptions) -> str:
    """Return a digest of all that decides a store's contents: files, tokenizer, template, options and their code."""
    found = xxh3_128()  # takes a fifth of the time of BLAKE2b: each start reads all files
    for path in files:
        update_digest(found, path)
        found.update(f"end of file, {suffix_of(path)}".encode())
    # The renderer has switched off truncation and padding of tokenizer.json, so that the key does not depend on them.
    found.update(tokenizer.backend_tokenizer.to_str().encode())
    parts = [tokenizer.chat_template, tokenizer.special_tokens_map, asdict(options), transformers.__version__]
    found.update(json.dumps(parts, sort_keys=True, default=str).encode())
    for module in code_of_stores():
        found.update(module.read_bytes())
    return found.hexdigest()


def code_of_stores() -> list[Path]:
    """Return the modules that decide what a store contains, sorted."""
    folder = Path(__file__).parent
    modules = [module for module in folder.glob("*.py") if module.stem not in NOT_IN_STORES]
    return sorted([*modules, *folder.glob("rendering/*.py")])
