"""Model and data made ready once per machine, before any collective, so that none can time out on slow work."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft_recipe.config import Config
from sft_recipe.data.batches import split_validation
from sft_recipe.data.cache import Examples, StoreOptions, TokenStore, open_store
from sft_recipe.data.formats import resolve_files
from sft_recipe.data.render import ensure_chat_template
from sft_recipe.errors import DataError, ModelError
from sft_recipe.models import ResolvedModel, resolve_model, resolve_tokenizer
from sft_recipe.training.meeting import meeting_place


@dataclass(frozen=True)
class Prepared:
    """What a run is made of: all of it is on this machine's disk."""

    model: ResolvedModel
    tokenizer: PreTrainedTokenizerBase
    has_own_template: bool
    train: Examples
    validation: Examples | None

    def stop_token_ids(self, sample: int = 1000) -> list[int]:
        """The special tokens that end the supervised turns of the data: where the trained model stops talking."""
        special = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special.add(self.tokenizer.eos_token_id)
        ends = set()
        for index in range(min(sample, len(self.train))):
            ids, mask = self.train[index]
            ends.add(int(ids[np.flatnonzero(mask)[-1]]))
        return sorted(ends & special)

    def identity(self, config: Config) -> dict[str, Any]:
        """What must be the same for a run to be continued: model, adapters, data, batch plan."""
        lora = config.lora
        return {
            "model": f"{self.model.name} ({_model_digest(self.model.folder)})",
            "lora": f"rank {lora.rank}, alpha {lora.alpha:g}, on {lora.target_modules}, not on {lora.exclude_modules}"
            if lora.enabled
            else "off",
            "model.override_config": config.model.override_config,
            "optim.optimizer": config.optim.optimizer,
            "data": self.train.store.fingerprint,
            "examples": len(self.train),
            "data.train_batch_size": config.data.train_batch_size,
            "data.shuffle": config.data.shuffle,
            "trainer.seed": config.trainer.seed,
        }


def prepare(config: Config, local_rank: int, say: Callable[[str], None]) -> Prepared:
    """Local rank 0 finds the model and builds the token stores; the other ranks of the machine wait, then open them.

    Raises ModelError and DataError.
    """
    note = meeting_place() / "prepared.json"
    if local_rank == 0:
        places = _make(config, say)
        _write(note, places)
    else:
        places = _wait_for(note)
    return _open(config, places)


def load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Raises ModelError where the folder holds no tokenizer that transformers can read."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{folder} holds no usable tokenizer: {str(error).splitlines()[0]}") from None


def _make(config: Config, say: Callable[[str], None]) -> dict[str, Any]:
    data, cache_dir = config.data, config.cache_dir()
    train_files = resolve_files(data.train_files)
    val_files = resolve_files(data.val_files) if data.val_files else []
    model = resolve_model(config.model, cache_dir)
    if model.notice:
        say(model.notice)
    tokenizer_folder = resolve_tokenizer(config.model, model, cache_dir)
    tokenizer = load_tokenizer(tokenizer_folder, config.model.trust_remote_code)
    has_own_template = not ensure_chat_template(tokenizer)
    if not has_own_template:
        say(f"{model.name} has no chat template: a plain ChatML one is used, and saved with the trained model.")
    _check_vocabulary(tokenizer, model)
    options = StoreOptions(data.format, data.max_length, data.truncation)
    stores = {}
    for part, files in (("train", train_files), ("validation", val_files)):
        if files:
            store = open_store(files, tokenizer, options, cache_dir, data.num_workers, show_progress=True)
            _tell_losses(store, part, options, say)
            stores[part] = str(store.folder)
    return {"model": [str(model.folder), model.name], "tokenizer": str(tokenizer_folder), "stores": stores}


def _open(config: Config, places: dict[str, Any]) -> Prepared:
    folder, name = places["model"]
    tokenizer = load_tokenizer(Path(places["tokenizer"]), config.model.trust_remote_code)
    has_own_template = not ensure_chat_template(tokenizer)
    store = TokenStore.open(Path(places["stores"]["train"]))
    train, validation = np.arange(len(store)), None
    if config.data.val_ratio:
        if len(store) < 2:
            raise DataError("data.val_ratio needs at least two examples, one to train on and one to validate with")
        train, held_out = split_validation(len(store), config.data.val_ratio, config.trainer.seed)
        validation = Examples(store, held_out)
    elif "validation" in places["stores"]:
        other = TokenStore.open(Path(places["stores"]["validation"]))
        validation = Examples(other, np.arange(len(other)))
    return Prepared(ResolvedModel(Path(folder), name), tokenizer, has_own_template, Examples(store, train), validation)


def _tell_losses(store: TokenStore, part: str, options: StoreOptions, say: Callable[[str], None]) -> None:
    """Truncation never cuts silently."""
    report = store.report
    if report.too_long:
        what = {"drop": "left out", "right": "cut at their end"}[options.truncation]
        share = 100 * report.too_long / report.records
        say(
            f"{part}: {report.too_long} of {report.records} examples ({share:.1f}%) are longer than "
            f"{options.max_length} tokens and {what} (data.truncation={options.truncation}); "
            f"the longest has {report.longest} tokens."
        )
    if report.without_target:
        left_out = f"{report.without_target} of {report.records} examples"
        say(f"{part}: {left_out} have no supervised token left and are left out.")


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: ResolvedModel) -> None:
    settings = json.loads((model.folder / "config.json").read_text())
    rows = settings.get("vocab_size") or settings.get("text_config", {}).get("vocab_size")
    largest = max(tokenizer.get_vocab().values())
    if rows and largest >= rows:
        raise ModelError(
            f"tokenizer and model do not fit: the tokenizer has a token with id {largest}, but {model.name} has {rows} "
            "embeddings; use the tokenizer that belongs to the model (TOKENIZER_PATH)"
        )


def _model_digest(folder: Path) -> str:
    """Of the model's settings and the sizes of its weights; reading all weights would take too long."""
    sizes = [[path.name, path.stat().st_size] for path in sorted(folder.glob("*.safetensors"))]
    text = (folder / "config.json").read_bytes() + json.dumps(sizes).encode()
    return hashlib.blake2b(text, digest_size=4).hexdigest()


def _write(note: Path, places: dict[str, Any]) -> None:
    partial = note.with_suffix(".partial")
    partial.write_text(json.dumps(places))
    partial.rename(note)


def _wait_for(note: Path) -> dict[str, Any]:
    """torchrun ends this process where local rank 0 fails, so waiting needs no time limit."""
    while not note.is_file():
        time.sleep(0.1)
    return json.loads(note.read_text())
