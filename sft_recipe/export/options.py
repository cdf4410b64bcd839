"""What an export is asked for, and what a format returns of what it wrote."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ExportOptions:
    """ExportOptions say what is written: `merge` merges the adapter; `dtype` is None for that of the stored model.

    `format` is hf, gguf or pth; `quant`, f16 or q8_0, is for gguf.
    """

    merge: bool = False
    dtype: str | None = None
    shard_size: int = 5 * 10**9
    format: str = "hf"
    quant: str = "f16"


@dataclass(frozen=True)
class Written:
    """Written describes an export before its verification.

    `bound` is the key of its bound; `load` loads the model back, and `prompt_ids` computes the tokens of a prompt with
    the exported tokenizer. `usage` is the section of the model card on loading it.
    """

    kind: str
    dtype: str
    bound: str
    load: Callable[[], Any]
    prompt_ids: Callable[[str], list[int]]
    usage: str
    remarks: list[str] = field(default_factory=list)
