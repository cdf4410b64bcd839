"""Exports into a Hugging Face folder: the complete model in shards, or the adapter alone."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import GENERATION_CONFIG_NAME

from sft_recipe.checkpoint.manager import check_free_space
from sft_recipe.export.merge import load_adapters
from sft_recipe.export.options import ExportOptions, Written
from sft_recipe.export.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from sft_recipe.export.trained import TrainedModel
from sft_recipe.export.verification import prompt_ids
from sft_recipe.export.weights import DTYPES, entry_bytes, write_weights
from sft_recipe.models.families import family_of
from sft_recipe.models.hf_config import read_hf_config
from sft_recipe.models.loading import load_model
from sft_recipe.models.quantization import adapter_metadata
from sft_recipe.models.resolve import ResolvedModel
from sft_recipe.models.tokenizer import read_tokenizer
from sft_recipe.progress import progress_bar


def write_hf_folder(trained: TrainedModel, options: ExportOptions, folder: Path, show_progress: bool) -> Written:
    """Write weights, tokenizer and generation config into `folder`. Raises ModelError and OSError."""
    is_adapter = bool(trained.source.adapter) and not options.merge
    dtype, bound = (
        _write_adapter(trained, options, folder)
        if is_adapter
        else _write_model(trained, options, folder, show_progress)
    )
    trained.tokenizer.save_pretrained(folder)
    _write_json(folder / GENERATION_CONFIG_NAME, trained.generation_settings())
    tokenizer = read_tokenizer(folder, str(folder), trained.trusts_code)
    return Written(
        kind="adapter" if is_adapter else "merged model" if trained.source.adapter else "model",
        dtype=dtype,
        bound=bound,
        load=partial(_load_adapter if is_adapter else _load_model, trained, folder),
        prompt_ids=partial(prompt_ids, tokenizer),
        usage=_usage(family_of(trained.config).auto_class, is_adapter, trained.quantized_in),
    )


def _write_model(trained: TrainedModel, options: ExportOptions, folder: Path, show: bool) -> tuple[str, str]:
    """Returns the dtype of the written weights, and the bound of their logits."""
    source, weights, stored = trained.source, trained.weights(), trained.dtype
    dtype = options.dtype or (stored if stored in DTYPES else "float32")
    check_free_space(folder, sum(entry_bytes(entry, DTYPES[dtype]) for entry in weights.entries.values()))
    with progress_bar("writing", "weights", len(weights.entries), show) as advance:
        write_weights(weights, folder, DTYPES[dtype], options.shard_size, advance)
    settings = json.loads((source.base.folder / "config.json").read_text(encoding="utf-8"))
    if source.adapter and source.settings.override_config:
        settings = json.loads(trained.config.to_json_string())
    for part in (settings, settings.get("text_config")):
        if isinstance(part, dict):
            part.pop("torch_dtype", None)
            part["dtype"] = dtype
            if source.adapter and not trained.model.config.tie_word_embeddings:
                part["tie_word_embeddings"] = False
    _write_json(folder / "config.json", settings)
    if "auto_map" in settings:
        for path in source.base.folder.glob("*.py"):
            shutil.copy(path, folder / path.name)
    is_exact = source.adapter is None and dtype in (stored, "float32")
    return dtype, "float32" if is_exact else dtype


def _write_adapter(trained: TrainedModel, options: ExportOptions, folder: Path) -> tuple[str, str]:
    """Returns the dtype of the written weights, and the bound of their logits."""
    adapter, base = trained.source.adapter, trained.source.base
    assert adapter
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    stored = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    dtype = options.dtype or stored
    if dtype != stored:
        weights = {name: value.to(DTYPES[dtype]) for name, value in weights.items()}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata=adapter_metadata(trained.quantized_in))
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    is_folder = Path(base.name).expanduser().exists()
    settings["base_model_name_or_path"] = str(base.folder.absolute()) if is_folder else base.name
    _write_json(folder / ADAPTER_CONFIG, settings)
    return dtype, "float32" if dtype in (stored, "float32") else dtype


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _load_adapter(trained: TrainedModel, folder: Path) -> Any:
    return load_adapters(trained.load_base(), folder).get_base_model()


def _load_model(trained: TrainedModel, folder: Path) -> Any:
    config = read_hf_config(ResolvedModel(folder, folder.name), trained.trusts_code)
    dtype: Any = config.dtype
    return load_model(folder, config, dtype, trained.trusts_code).eval()


def _usage(auto_class: str, is_adapter: bool, quantized_in: torch.dtype | None) -> str:
    model_class = auto_class.replace("Auto", "AutoPeft", 1) if is_adapter else auto_class
    imports = [f"from transformers import {model_class}, AutoTokenizer"]
    if is_adapter:
        imports = [f"from peft import {model_class}", "from transformers import AutoTokenizer"]
    arguments = "folder"
    if is_adapter and quantized_in:
        imports = ["import torch", imports[0], "from transformers import AutoTokenizer, BitsAndBytesConfig"]
        arguments += f""", dtype={quantized_in}, quantization_config=BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype={quantized_in},
)"""
    lines = [*imports, "", 'folder = "."  # this folder', f"model = {model_class}.from_pretrained({arguments})"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
    return "```python\n" + "\n".join(lines) + "\n```"
