"""Helpers of the tests that build token stores."""

import json
from pathlib import Path

from sft_recipe.data.formats import read_conversations
from sft_recipe.data.pipeline import open_store
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.data.token_store import StoreOptions, TokenStore

FILES = ["store.json", "offsets.npy", "supervised.npy", "digests.npy", "groups.npy", "input_ids.bin", "loss_mask.bin"]
RECORDS = [
    {"prompt": "Hello there", "response": "I am fine, thank you."},
    {"prompt": "你好", "response": "很好，谢谢。"},
    {"prompt": "1 2 3", "response": "4 5 6 " * 20},
    {"prompt": "What is the capital of France?", "response": "Paris."},
]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def build(files, tokenizer, cache_dir, workers=1, **options) -> TokenStore:
    files = [files] if isinstance(files, Path) else files
    return open_store(files, tokenizer, StoreOptions(**options), cache_dir, workers)


def examples(store: TokenStore) -> list[tuple[list[int], list[int]]]:
    return [(ids.tolist(), mask.tolist()) for ids, mask in (store[index] for index in range(len(store)))]


def encoded(tokenizer, *files: Path) -> list[tuple[list[int], list[int]]]:
    """Return ids and masks of all records, each encoded by itself: the oracle of the tests."""
    renderer = Renderer(tokenizer)
    conversations = [renderer.encode(conversation) for path in files for conversation in read_conversations(path)]
    return [(example.input_ids, example.loss_mask) for example in conversations]


def cache_contents(cache_dir: Path) -> list[str]:
    return [path.name for path in cache_dir.rglob("*")] if cache_dir.is_dir() else []


def store_names(cache_dir: Path) -> list[str]:
    return [path.name for path in (cache_dir / "tokens").iterdir()]
