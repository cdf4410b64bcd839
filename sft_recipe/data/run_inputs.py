"""Prepares model, tokenizer and token stores once per machine, before any collective that could time out meanwhile."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from sft_recipe.config.schema import Config, DataConfig
from sft_recipe.config.secrets import without_secrets
from sft_recipe.data.batching import sample_mixture, split_validation
from sft_recipe.data.notices import data_notices
from sft_recipe.data.pipeline import open_store
from sft_recipe.data.rendering.renderer import RenderOptions
from sft_recipe.data.rendering.thinking_mix import mix_notice
from sft_recipe.data.sources import Source, SourceCounts, resolve_files
from sft_recipe.data.statistics import DataStatistics, data_statistics, end_token
from sft_recipe.data.token_store import REJECTED, Examples, StoreOptions, TokenStore
from sft_recipe.distributed.rendezvous import rendezvous_dir
from sft_recipe.errors import DataError
from sft_recipe.files import digest, write_text
from sft_recipe.models.families import Family, decoder_start_token_id, family_of, fit
from sft_recipe.models.hf_config import load_hf_config
from sft_recipe.models.resolve import ResolvedModel, resolve_model, resolve_tokenizer
from sft_recipe.models.stats import Positions
from sft_recipe.models.tokenizer import check_vocabulary, load_tokenizer
from sft_recipe.models.weight_files import weight_files

VALIDATION = "validation "  # in front of the name of a validation set, in the names of stores
READY_FILE = "prepared.json"
DATE = "data.date"  # in the identity of a run
SAMPLES, SAMPLE_BYTES = 32, 4096  # of a weight file, in the digest of a model


@dataclass(frozen=True)
class RunInputs:
    """RunInputs are the model, tokenizer and examples of a run, all on this machine's disk."""

    model: ResolvedModel
    family: Family
    tokenizer: PreTrainedTokenizerBase
    train: Examples
    validation: dict[str, Examples]  # by the name of the set; one without a name has an empty one
    source_counts: list[SourceCounts]
    date: str | None = None  # that the chat template writes (see RenderOptions), None where it writes none

    def stop_token_ids(self, sample: int = 1000) -> list[int]:
        """Return the special tokens that end the supervised turns of the first `sample` examples, sorted.

        At inference the trained model ends its answers with these tokens: those of the last turns and, where these also
        occur in contexts, as markers and ends of turns do, those of earlier turns (`<|observation|>` after a call),
        unless they occur inside a turn.
        """
        last: set[int] = set()
        earlier, inside, context = set[int](), set[int](), set[int]()
        for index in range(min(sample, len(self.train))):
            ids, mask = self.train[index]
            is_end = (mask == 1) & (np.append(mask[1:], 0) == 0)
            last.add(end_token(ids, mask, self._special_ids))
            earlier.update(ids[is_end].tolist())
            inside.update(ids[(mask == 1) & ~is_end].tolist())
            context.update(ids[mask == 0].tolist())
        return sorted((last | (earlier - inside if last & context else set())) & self._special_ids)

    def statistics(self, truncation: str) -> DataStatistics:
        """Return the statistics of the training data, for which data.truncation was `truncation`."""
        return data_statistics(self.train, truncation, self._special_ids)

    @cached_property
    def _special_ids(self) -> set[int]:
        special = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return special | {self.tokenizer.eos_token_id}

    def positions_notice(self, config: Config, positions: Positions | None) -> str | None:
        """Return what to say where examples may have more positions than the model. Raises ConfigError."""
        if positions is None:
            return None
        limit = max(config.data.max_length, config.data.max_target_length or 0)
        return positions.notice(self.model.name, limit, self.train.longest_sequence(config.data.has_targets))

    def identity(self, config: Config) -> dict[str, Any]:
        """Return what must be equal for a run to be resumed: model, adapters, data, order of batches.

        A model is its content: its name, in front of the digest, is for messages (see consistency.different_keys).
        """
        lora = config.lora
        base = ", over weights in 4 bits" if lora.quantize else ""
        return {
            **self._model_identity,
            "lora": f"rank {lora.rank}, alpha {lora.alpha:g}, on {lora.target_modules}, not on {lora.exclude_modules}"
            + base
            if lora.enabled
            else "off",
            "model.freeze": sorted(set(config.model.freeze)),
            "model.train_only": sorted(set(config.model.train_only)),
            "model.override_config": without_secrets(config.model.override_config),
            "optim.optimizer": config.optim.optimizer,
            "data": self.train.fingerprint,
            DATE: self.date,
            "examples": len(self.train),
            "data.train_batch_size": config.data.train_batch_size,
            "data.shuffle": config.data.order == "shuffle",
            "trainer.seed": config.trainer.seed,
        }

    @cached_property
    def _model_identity(self) -> dict[str, str]:
        """Read once: the folder may be gone when a checkpoint is saved."""
        folder = self.model.folder
        return {"model": f"{self.model.name} ({_model_digest(folder)})", "model.weights": _weights_digest(folder)}


def prepare(config: Config, local_rank: int, say: Callable[[str], None], date: str | None = None) -> RunInputs:
    """Return the inputs of a run. Local rank 0 finds the model and builds the token stores; the other ranks of the
    machine wait for it and open them. `say` receives notices for the user. `date` is that of the run that is resumed,
    for chat templates that write it; None is today.

    Raises ModelError and DataError.
    """
    has_others = os.environ.get("LOCAL_WORLD_SIZE", "1") != "1"
    if local_rank == 0:
        tokenizer, paths = _prepare_machine(config, say, date)
        if has_others:
            write_text(rendezvous_dir() / READY_FILE, json.dumps(paths))
    else:
        paths = _wait_for(rendezvous_dir() / READY_FILE)
        tokenizer = load_tokenizer(config.model, Path(paths["tokenizer"]), _model(config, paths)[1])
    return _open_inputs(config, paths, tokenizer)


def render_options(config: Config, date: str | None = None) -> RenderOptions:
    """Return the rendering options that the configuration asks for, for a template that writes a date."""
    data = config.data
    draws = data.thinking_mix is not None or data.random_system_prompt or data.drop_empty_thoughts
    return RenderOptions(
        data.train_on,
        data.train_on_reasoning,
        data.enable_thinking,
        data.parse_special_tokens,
        data.chat_template_kwargs,
        data.fold_system,
        data.append_stop_token,
        data.thinking_mix,
        data.random_system_prompt,
        data.drop_empty_thoughts,
        seed=config.trainer.seed if draws else 0,  # no other store depends on it
        date=date,
    )


def store_options(config: Config, hf_config: PretrainedConfig | None = None, date: str | None = None) -> StoreOptions:
    """Return the options of a store that the configuration asks for, for a model with the configuration `hf_config`."""
    data = config.data
    return StoreOptions(
        data.format,
        data.max_length,
        data.max_target_length,
        decoder_start_token_id(hf_config) if hf_config and data.has_targets else None,
        data.max_chars,
        data.truncation,
        data.columns,
        data.roles,
        data.on_bad_record,
        render_options(config, date),
        data.split_turns is True,
    )


def _prepare_machine(
    config: Config, say: Callable[[str], None], date: str | None
) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """Return the tokenizer, and the paths of everything as JSON for the other ranks."""
    data, cache_dir = config.data, config.cache_dir()
    sources = {"train": resolve_files(data.train_files, cache_dir)}
    sources |= {
        f"{VALIDATION}{name}": resolve_files(files, cache_dir) for name, files in _validation_files(data).items()
    }
    model = resolve_model(config.model, cache_dir)
    if model.notice:
        say(model.notice)
    tokenizer_folder = resolve_tokenizer(config.model, model, cache_dir)
    hf_config = load_hf_config(config.model, model)
    config = fit(config, hf_config)
    tokenizer = load_tokenizer(config.model, tokenizer_folder, family_of(hf_config), say)
    check_vocabulary(tokenizer, model)
    date = (date or datetime.now().date().isoformat()) if "strftime_now" in str(tokenizer.chat_template) else None
    data, options = config.data, store_options(config, hf_config, date)
    if notice := mix_notice(data.thinking_mix, tokenizer):
        say(notice)
    rejected = config.trainer.run_folder / REJECTED
    is_rank_0 = os.environ.get("RANK", "0") == "0"  # machines share the run folder
    if is_rank_0:
        rejected.unlink(missing_ok=True)
    stores, source_counts = {}, {}
    for part, part_sources in sources.items():
        files = [file for source in part_sources for file in source.files]
        with _preserved_truncation_and_padding(tokenizer):
            store = open_store(files, tokenizer, options, cache_dir, data.num_workers, show_progress=True)
        if is_rank_0 and store.report.rejected:
            with rejected.open("ab") as file:
                file.write((store.folder / REJECTED).read_bytes())
        for notice in data_notices(store.report, part.strip(), data, rejected):
            say(notice)
        stores[part] = str(store.folder)
        source_counts[part] = [asdict(counts) for counts in _count_examples(part_sources, store)]
    paths = {
        "model": [str(model.folder), model.name],
        "tokenizer": str(tokenizer_folder),
        "stores": stores,
        "date": date,
    }
    return tokenizer, paths | {"source_counts": source_counts}


@contextmanager
def _preserved_truncation_and_padding(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Restore the truncation and padding of tokenizer.json, which building a store switches off."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = (core.truncation, core.padding) if core else (None, None)
    yield
    if core and truncation:
        core.enable_truncation(**truncation)
    if core and padding:
        core.enable_padding(**padding)


def _count_examples(sources: list[Source], store: TokenStore) -> list[SourceCounts]:
    """Raises DataError for a source without examples."""
    counts = iter(store.report.examples_of_files)
    source_counts = []
    for source in sources:
        examples = sum(next(counts) for _ in source.files)
        if not examples:
            raise DataError(
                f"{source.name}: no example is left to train on; remove it from the data, or see the notices above"
            )
        source_counts.append(SourceCounts(source.name, examples, source.target_count(examples)))
    return source_counts


def _wait_for(ready_file: Path) -> dict[str, Any]:
    """Wait without a time limit, since torchrun ends this process if local rank 0 fails."""
    while not ready_file.is_file():
        time.sleep(0.1)
    return json.loads(ready_file.read_text())


def _model(config: Config, paths: dict[str, Any]) -> tuple[ResolvedModel, Family]:
    folder, name = paths["model"]
    model = ResolvedModel(Path(folder), name)
    return model, family_of(load_hf_config(config.model, model))


def _open_inputs(config: Config, paths: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> RunInputs:
    model, family = _model(config, paths)
    seed, val_ratio = config.trainer.seed, config.data.val_ratio
    source_counts = {part: [SourceCounts(**item) for item in items] for part, items in paths["source_counts"].items()}
    parts = {}
    for part, store_folder in paths["stores"].items():
        counts = [(item.examples, item.target_count) for item in source_counts[part]]
        parts[part] = Examples(TokenStore.open(Path(store_folder)), sample_mixture(counts, seed))
    train = parts.pop("train")
    validation = {part.removeprefix(VALIDATION): examples for part, examples in parts.items()}
    if val_ratio:
        train, validation[""] = _hold_out(train, val_ratio, seed)
    if config.data.limit:
        train = _first(config.data.limit, train)
    limit = config.eval.limit
    validation = {name: _first(limit, examples) if limit else examples for name, examples in validation.items()}
    return RunInputs(model, family, tokenizer, train, validation, source_counts["train"], paths["date"])


def _validation_files(data: DataConfig) -> dict[str, str | list[str]]:
    if isinstance(data.val_files, dict):
        return data.val_files
    return {"": data.val_files} if data.val_files else {}


def _first(count: int, examples: Examples) -> Examples:
    return Examples(examples.store, examples.numbers[:count])


def _hold_out(train: Examples, ratio: float, seed: int) -> tuple[Examples, Examples]:
    """Split off validation examples. Raises DataError if all examples belong to one group."""
    training, held_out = split_validation(train.store.groups[train.numbers], ratio, seed)
    if not len(held_out):
        raise DataError("data.val_ratio needs two different examples, one to train on and one to validate with")
    validation = np.unique(train.numbers[held_out])
    return Examples(train.store, train.numbers[training]), Examples(train.store, validation)


def _weights_digest(folder: Path) -> str:
    """Return a digest of samples from every weight file; reading all of it would take too long."""
    samples = []
    for path in weight_files(folder):
        size = path.stat().st_size
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(size * sample // SAMPLES)
                samples.append(file.read(SAMPLE_BYTES))
    return digest(*samples)


def _model_digest(folder: Path) -> str:
    """Return a digest of config.json and the sizes of the weight files."""
    sizes = [[path.name, path.stat().st_size] for path in weight_files(folder)]
    return digest(folder / "config.json", json.dumps(sizes).encode(), size=4)
