"""Exports a trained model into a new folder, and verifies what was written before the folder gets its name."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.logging import disable_progress_bar

from sft_recipe.checkpoint.manager import check_free_space
from sft_recipe.errors import ConfigError, ModelError, PreflightError, first_line
from sft_recipe.export.generation import generation_settings, turn_end_ids
from sft_recipe.export.merge import MergedWeights, load_adapters
from sft_recipe.export.model_card import model_card
from sft_recipe.export.source import ADAPTER_CONFIG, Source
from sft_recipe.export.verification import Verification, make_reference, verify_export, verify_tokenizer
from sft_recipe.export.weights import DTYPES, StoredWeights, Weights, entry_bytes, write_weights
from sft_recipe.files import sync
from sft_recipe.models.hf_config import load_hf_config
from sft_recipe.models.loading import load_model
from sft_recipe.progress import progress_bar

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class ExportOptions:
    """ExportOptions say what is written: `merge` merges the adapter; `dtype` is None for that of the stored model."""

    merge: bool = False
    dtype: str | None = None
    shard_size: int = 5 * 10**9


@dataclass(frozen=True)
class Export:
    """An Export describes what was written into `folder`."""

    folder: Path
    kind: str
    dtype: str
    files: dict[str, int]
    verification: Verification

    def as_dict(self) -> dict[str, Any]:
        """Return the description as JSON can hold it."""
        return asdict(self) | {"folder": str(self.folder)}


@dataclass(frozen=True)
class _Trained:
    """The trained model, loaded in the dtype of its files; with an adapter, `model` has it in its layers."""

    source: Source
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    model: Any
    stored: StoredWeights

    @property
    def trusts_code(self) -> bool:
        return self.source.settings.trust_remote_code


def export_model(source: Source, options: ExportOptions, out: Path, show_progress: bool) -> Export:
    """Write the model into the new folder `out`; returns what was written and how it compares with the trained model.

    Nothing is left where it fails. Raises ConfigError for options that do not fit the model, PreflightError where
    `out` holds something or cannot be written, ModelError where the export does not compute what the model computes.
    """
    if options.merge and source.adapter is None:
        raise ConfigError(f"{source.name} is a complete model, with no adapter to merge: leave --merge out")
    disable_progress_bar()
    with _new_folder(out) as folder:
        with progress_bar("computing the trained model's answers", "steps", show=show_progress):
            trained = _load(source)
            reference = make_reference(trained.model, trained.tokenizer)
        write = _write_adapter if source.adapter and not options.merge else _write_model
        kind, dtype, bound = write(trained, options, folder, show_progress)
        _write_tokenizer(trained, folder)
        with progress_bar("loading the export back", "steps", show=show_progress):
            exported = _load_back(trained, folder)
            verify_tokenizer(_load_tokenizer(folder, trained.trusts_code), reference)
            verification = verify_export(exported, reference, bound)
        card = model_card(source, kind, dtype, verification, out.name, _usage(trained, kind))
        (folder / "README.md").write_text(card, encoding="utf-8")
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Export(out, kind, dtype, files, verification)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Give an empty folder beside `out` that gets its name at the end, and is removed where the context fails."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise PreflightError(f"--out {out} exists already and is not an empty folder; name a new one, or remove it")
    partial = out.absolute().with_name(f".{out.absolute().name}.{uuid4().hex[:12]}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            path.chmod(partial.stat().st_mode & 0o666)  # safetensors writes files that only the owner can read
            sync(path)
        partial.rename(out.absolute())
    except OSError as error:
        raise PreflightError(f"--out {out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _load(source: Source) -> _Trained:
    settings = source.settings
    if source.adapter is None:  # the overrides of its run are in its config.json
        settings = settings.model_copy(update={"override_config": {}})
    config = load_hf_config(settings, source.base)
    tokenizer = _load_tokenizer(source.tokenizer, settings.trust_remote_code)
    stored = StoredWeights(source.base.folder)
    dtype = DTYPES.get(stored_dtype(stored), torch.float32)
    model: Any = load_model(source.base.folder, config, dtype, settings.trust_remote_code).eval()
    if source.adapter:
        model = load_adapters(model, source.adapter).get_base_model()
    return _Trained(source, config, tokenizer, model, stored)


def stored_dtype(weights: Weights) -> str:
    """Return the name of the dtype that most bytes of a model's weights have."""
    sizes: Counter[torch.dtype] = Counter()
    for entry in weights.entries.values():
        sizes[entry.dtype] += entry_bytes(entry, entry.dtype)
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{folder} holds no usable tokenizer: {first_line(error)}") from None


def _write_model(trained: _Trained, options: ExportOptions, folder: Path, show: bool) -> tuple[str, str, str]:
    """Write the complete model. Returns what it is, its dtype, and the bound of its logits."""
    source, weights = trained.source, _weights(trained)
    stored = stored_dtype(trained.stored)
    dtype = options.dtype or (stored if stored in DTYPES else "float32")
    check_free_space(folder, sum(entry_bytes(entry, DTYPES[dtype]) for entry in weights.entries.values()))
    with progress_bar("writing", "weights", len(weights.entries), show) as advance:
        write_weights(weights, folder, DTYPES[dtype], options.shard_size, advance)
    settings = json.loads((source.base.folder / "config.json").read_text(encoding="utf-8"))
    if source.adapter and source.settings.override_config:
        settings = json.loads(trained.config.to_json_string())
    ties = trained.model.config.tie_word_embeddings
    for part in (settings, settings.get("text_config")):
        if isinstance(part, dict):
            part.pop("torch_dtype", None)
            part["dtype"] = dtype
            if source.adapter and not ties:
                part["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if "auto_map" in settings:
        for path in source.base.folder.glob("*.py"):
            shutil.copy(path, folder / path.name)
    is_exact = source.adapter is None and dtype in (stored, "float32")
    return "merged model" if source.adapter else "model", dtype, "float32" if is_exact else dtype


def _weights(trained: _Trained) -> Weights:
    adapter = trained.source.adapter
    return MergedWeights(trained.stored, trained.model, adapter) if adapter else trained.stored


def _write_adapter(trained: _Trained, options: ExportOptions, folder: Path, show: bool) -> tuple[str, str, str]:
    """Write the adapter alone. Returns what it is, its dtype, and the bound of its logits."""
    adapter, base = trained.source.adapter, trained.source.base
    assert adapter
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    stored = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    dtype = options.dtype or stored
    if dtype != stored:
        weights = {name: value.to(DTYPES[dtype]) for name, value in weights.items()}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    is_folder = Path(base.name).expanduser().exists()
    settings["base_model_name_or_path"] = str(base.folder.absolute()) if is_folder else base.name
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    return "adapter", dtype, "float32" if dtype in (stored, "float32") else dtype


def _write_tokenizer(trained: _Trained, folder: Path) -> None:
    trained.tokenizer.save_pretrained(folder)
    origin = trained.source.tokenizer
    if not (origin / GENERATION_CONFIG_NAME).is_file():
        origin = trained.source.base.folder
    settings = generation_settings(origin, trained.config, turn_end_ids(trained.tokenizer))
    (folder / GENERATION_CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _load_back(trained: _Trained, folder: Path) -> Any:
    if (folder / ADAPTER_CONFIG).is_file():
        base = load_model(trained.source.base.folder, trained.config, trained.model.dtype, trained.trusts_code)
        return load_adapters(base, folder).get_base_model()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trained.trusts_code)
    return load_model(folder, config, config.dtype, trained.trusts_code).eval()


def _usage(trained: _Trained, kind: str) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if kind == "adapter":
        lines.insert(0, "from peft import AutoPeftModelForCausalLM")
        lines[1] = "from transformers import AutoTokenizer"
    model_class = "AutoPeftModelForCausalLM" if kind == "adapter" else "AutoModelForCausalLM"
    lines += ['folder = "."  # this folder', f"model = {model_class}.from_pretrained(folder)"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"
