"""Model and data made ready once per machine, before any collective, so that none can time out on slow work."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft_recipe.config import Config, DataConfig, ModelConfig, without_secrets
from sft_recipe.data.batches import mixture, split_validation
from sft_recipe.data.cache import REJECTED, Examples, TokenStore, open_store
from sft_recipe.data.encode import StoreOptions
from sft_recipe.data.files import Share, Source, resolve_files
from sft_recipe.data.render import RenderOptions, ensure_chat_template
from sft_recipe.errors import DataError, ModelError
from sft_recipe.models import ResolvedModel, resolve_model, resolve_tokenizer
from sft_recipe.training.meeting import meeting_place


@dataclass(frozen=True)
class Prepared:
    """What a run is made of: all of it is on this machine's disk."""

    model: ResolvedModel
    tokenizer: PreTrainedTokenizerBase
    train: Examples
    validation: Examples | None
    shares: list[Share]

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
            "model.override_config": without_secrets(config.model.override_config),
            "optim.optimizer": config.optim.optimizer,
            "data": self.train.fingerprint,
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
        tokenizer, places = _make(config, say)
        _write(note, places)
    else:
        places = _wait_for(note)
        tokenizer = load_tokenizer(config.model, Path(places["tokenizer"]))
    return _open(config, places, tokenizer)


def load_tokenizer(
    config: ModelConfig, folder: Path, say: Callable[[str], None] = lambda text: None
) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template that is trained, and saved: the one named, else its own, else plain ChatML.

    Raises ModelError where the folder holds no tokenizer that transformers can read, or the template cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{folder} holds no usable tokenizer: {str(error).splitlines()[0]}") from None
    if config.chat_template:
        path = Path(config.chat_template).expanduser()
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ModelError(f"model.chat_template: {path.absolute()} cannot be read: {reason}") from None
    if ensure_chat_template(tokenizer):
        say(f"{config.path} has no chat template: a plain ChatML one is used, and saved with the trained model.")
    return tokenizer


def store_options(data: DataConfig) -> StoreOptions:
    """What the configuration asks of a store."""
    render = RenderOptions(data.train_on, data.train_on_reasoning, data.enable_thinking, data.allow_special_text)
    return StoreOptions(data.format, data.max_length, data.truncation, data.columns, data.on_bad_record, render)


def _make(config: Config, say: Callable[[str], None]) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    data, cache_dir = config.data, config.cache_dir()
    sources = {"train": resolve_files(data.train_files, cache_dir)}
    if data.val_files:
        sources["validation"] = resolve_files(data.val_files, cache_dir)
    model = resolve_model(config.model, cache_dir)
    if model.notice:
        say(model.notice)
    tokenizer_folder = resolve_tokenizer(config.model, model, cache_dir)
    tokenizer = load_tokenizer(config.model, tokenizer_folder, say)
    _check_vocabulary(tokenizer, model)
    options = store_options(data)
    stores, shares = {}, {}
    is_first = os.environ.get("RANK", "0") == "0"  # of all machines, which share the run folder
    rejected = config.trainer.run_folder / REJECTED
    if is_first:
        rejected.unlink(missing_ok=True)
    for part, of_part in sources.items():
        files = [file for source in of_part for file in source.files]
        with _as_loaded(tokenizer):
            store = open_store(files, tokenizer, options, cache_dir, data.num_workers, show_progress=True)
        if is_first and store.report.rejected:
            with rejected.open("ab") as file:
                file.write((store.folder / REJECTED).read_bytes())
        _tell_losses(store, part, data, rejected, say)
        stores[part] = str(store.folder)
        shares[part] = [asdict(share) for share in _shares(of_part, store)]
    place = str(tokenizer_folder)
    places = {"model": [str(model.folder), model.name], "tokenizer": place, "stores": stores, "shares": shares}
    return tokenizer, places


@contextmanager
def _as_loaded(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Making a store switches off the truncation and padding that a tokenizer.json asks for; the model's keeps them."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = (core.truncation, core.padding) if core else (None, None)
    yield
    if core and truncation:
        core.enable_truncation(**truncation)
    if core and padding:
        core.enable_padding(**padding)


def _shares(sources: list[Source], store: TokenStore) -> list[Share]:
    """Raises DataError for a source that has no example left."""
    counts = iter(store.report.examples_of_files)
    shares = []
    for source in sources:
        examples = sum(next(counts) for _ in source.files)
        if not examples:
            raise DataError(f"{source.name}: no example of it is left to train on; leave it out, or see the notices")
        shares.append(Share(source.name, examples, source.wanted(examples)))
    return shares


def _open(config: Config, places: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Prepared:
    folder, name = places["model"]
    seed = config.trainer.seed
    parts, shares = {}, {}
    for part, store_folder in places["stores"].items():
        store = TokenStore.open(Path(store_folder))
        shares[part] = [Share(**share) for share in places["shares"][part]]
        counts = [(share.examples, share.wanted) for share in shares[part]]
        parts[part] = Examples(store, mixture(counts, seed))
    train, validation = parts["train"], parts.get("validation")
    if config.data.val_ratio:
        kept, held_out = split_validation(train.store.digests[train.numbers], config.data.val_ratio, seed)
        if not len(held_out):
            raise DataError("data.val_ratio needs two different examples, one to train on and one to validate with")
        held_out = np.unique(train.numbers[held_out])
        train, validation = Examples(train.store, train.numbers[kept]), Examples(train.store, held_out)
    return Prepared(ResolvedModel(Path(folder), name), tokenizer, train, validation, shares["train"])


def _tell_losses(store: TokenStore, part: str, data: DataConfig, rejected: Path, say: Callable[[str], None]) -> None:
    """Nothing is cut, left out or changed in silence. Raises DataError where too many records are bad."""
    report = store.report
    bad = sum(report.rejected.values())
    if bad:
        what = f"{part}: {bad:,} of {report.records:,} records cannot be used ({report.kinds}); see {rejected}"
        if bad > data.max_bad_ratio * report.records:
            raise DataError(f"{what}. That is more than data.max_bad_ratio={data.max_bad_ratio:g} of them.")
        say(f"{what}.")
    if report.too_long:
        what = {"drop": "left out", "right": "cut at their end"}[data.truncation]
        share = 100 * report.too_long / report.records
        say(
            f"{part}: {report.too_long} of {report.records} examples ({share:.1f}%) are longer than "
            f"{data.max_length} tokens and {what} (data.truncation={data.truncation}); "
            f"the longest has {report.longest} tokens."
        )
    if report.without_target:
        left_out = f"{report.without_target} of {report.records} examples"
        say(f"{part}: {left_out} have no supervised token left and are left out.")
    if report.special_text:
        held = f"{report.special_text:,} of {report.records:,} records"
        say(f"{part}: {held} spell a special token in their text; it stays text (data.allow_special_text).")
    if report.hidden_thoughts:
        say(
            f"{part}: the chat template does not show the thinking (up to </think>) in the last turn of "
            f"{report.hidden_thoughts:,} of {report.records:,} records, so that it is not learnt; model.chat_template "
            "can give one that does."
        )


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
