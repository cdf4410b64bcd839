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
from transformers import PreTrainedTokenizerBase

from sft_recipe.config.schema import Config, DataConfig
from sft_recipe.config.secrets import without_secrets
from sft_recipe.data.batching import sample_mixture, split_validation
from sft_recipe.data.rendering.renderer import RenderOptions
from sft_recipe.data.sources import Source, SourceCounts, resolve_files
from sft_recipe.data.token_store import REJECTED, Examples, TokenStore, open_store
from sft_recipe.data.tokenize import StoreOptions
from sft_recipe.distributed.rendezvous import rendezvous_dir
from sft_recipe.errors import DataError
from sft_recipe.models.resolve import ResolvedModel, resolve_model, resolve_tokenizer
from sft_recipe.models.tokenizer import check_vocabulary, load_tokenizer


@dataclass(frozen=True)
class RunInputs:
    """What a run is made of: all of it is on this machine's disk."""

    model: ResolvedModel
    tokenizer: PreTrainedTokenizerBase
    train: Examples
    validation: Examples | None
    source_counts: list[SourceCounts]

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


def prepare(config: Config, local_rank: int, say: Callable[[str], None]) -> RunInputs:
    """Local rank 0 finds the model and builds the token stores; the other ranks of the machine wait, then open them.

    Raises ModelError and DataError.
    """
    ready_file = rendezvous_dir() / "prepared.json"
    if local_rank == 0:
        tokenizer, paths = _make(config, say)
        _write(ready_file, paths)
    else:
        paths = _wait_for(ready_file)
        tokenizer = load_tokenizer(config.model, Path(paths["tokenizer"]))
    return _open(config, paths, tokenizer)


def store_options(data: DataConfig) -> StoreOptions:
    """What the configuration asks of a store."""
    render = RenderOptions(data.train_on, data.train_on_reasoning, data.enable_thinking, data.parse_special_tokens)
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
    check_vocabulary(tokenizer, model)
    options = store_options(data)
    stores, source_counts = {}, {}
    is_first = os.environ.get("RANK", "0") == "0"  # of all machines, which share the run folder
    rejected = config.trainer.run_folder / REJECTED
    if is_first:
        rejected.unlink(missing_ok=True)
    for part, of_part in sources.items():
        files = [file for source in of_part for file in source.files]
        with _preserved_truncation_and_padding(tokenizer):
            store = open_store(files, tokenizer, options, cache_dir, data.num_workers, show_progress=True)
        if is_first and store.report.rejected:
            with rejected.open("ab") as file:
                file.write((store.folder / REJECTED).read_bytes())
        _report_dropped(store, part, data, rejected, say)
        stores[part] = str(store.folder)
        source_counts[part] = [asdict(item) for item in _source_counts(of_part, store)]
    paths = {"model": [str(model.folder), model.name], "tokenizer": str(tokenizer_folder), "stores": stores}
    return tokenizer, paths | {"source_counts": source_counts}


@contextmanager
def _preserved_truncation_and_padding(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Making a store switches off the truncation and padding that a tokenizer.json asks for; the model's keeps them."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = (core.truncation, core.padding) if core else (None, None)
    yield
    if core and truncation:
        core.enable_truncation(**truncation)
    if core and padding:
        core.enable_padding(**padding)


def _source_counts(sources: list[Source], store: TokenStore) -> list[SourceCounts]:
    """Raises DataError for a source that has no example left."""
    counts = iter(store.report.examples_of_files)
    source_counts = []
    for source in sources:
        examples = sum(next(counts) for _ in source.files)
        if not examples:
            raise DataError(f"{source.name}: no example of it is left to train on; leave it out, or see the notices")
        source_counts.append(SourceCounts(source.name, examples, source.target_count(examples)))
    return source_counts


def _open(config: Config, paths: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> RunInputs:
    folder, name = paths["model"]
    seed = config.trainer.seed
    parts, source_counts = {}, {}
    for part, store_folder in paths["stores"].items():
        store = TokenStore.open(Path(store_folder))
        source_counts[part] = [SourceCounts(**item) for item in paths["source_counts"][part]]
        counts = [(item.examples, item.target_count) for item in source_counts[part]]
        parts[part] = Examples(store, sample_mixture(counts, seed))
    train, validation = parts["train"], parts.get("validation")
    if config.data.val_ratio:
        kept, held_out = split_validation(train.store.digests[train.numbers], config.data.val_ratio, seed)
        if not len(held_out):
            raise DataError("data.val_ratio needs two different examples, one to train on and one to validate with")
        held_out = np.unique(train.numbers[held_out])
        train, validation = Examples(train.store, train.numbers[kept]), Examples(train.store, held_out)
    return RunInputs(ResolvedModel(Path(folder), name), tokenizer, train, validation, source_counts["train"])


def _report_dropped(store: TokenStore, part: str, data: DataConfig, rejected: Path, say: Callable[[str], None]) -> None:
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
        say(f"{part}: {held} spell a special token in their text; it stays text (data.parse_special_tokens).")
    if report.dropped_reasoning:
        say(
            f"{part}: the chat template drops the reasoning (up to </think>) in the last turn of "
            f"{report.dropped_reasoning:,} of {report.records:,} records, so the model is not trained on it; "
            "set model.chat_template to a template that keeps it."
        )


def _model_digest(folder: Path) -> str:
    """Of the model's settings and the sizes of its weights; reading all weights would take too long."""
    sizes = [[path.name, path.stat().st_size] for path in sorted(folder.glob("*.safetensors"))]
    text = (folder / "config.json").read_bytes() + json.dumps(sizes).encode()
    return hashlib.blake2b(text, digest_size=4).hexdigest()


def _write(ready_file: Path, paths: dict[str, Any]) -> None:
    partial = ready_file.with_suffix(".partial")
    partial.write_text(json.dumps(paths))
    partial.rename(ready_file)


def _wait_for(ready_file: Path) -> dict[str, Any]:
    """torchrun ends this process where local rank 0 fails, so waiting needs no time limit."""
    while not ready_file.is_file():
        time.sleep(0.1)
    return json.loads(ready_file.read_text())
