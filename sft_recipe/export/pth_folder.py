"""Exports into the .pth files of MiniMind: a state dict of the complete model, or the adapter alone."""

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from sft_recipe.checkpoint.manager import check_free_space
from sft_recipe.errors import ModelError
from sft_recipe.export.merge import load_adapters
from sft_recipe.export.options import ExportOptions, Written
from sft_recipe.export.source import ADAPTER_CONFIG
from sft_recipe.export.trained import TrainedModel
from sft_recipe.export.verification import prompt_ids
from sft_recipe.export.weights import DTYPES, entry_bytes
from sft_recipe.models import minimind
from sft_recipe.models.loading import load_model
from sft_recipe.models.minimind_lora import from_peft, write_peft_folder
from sft_recipe.models.state_dict import StateDict, read_state_dict, write_model
from sft_recipe.models.tokenizer import read_tokenizer
from sft_recipe.progress import progress_bar


def write_pth_folder(trained: TrainedModel, options: ExportOptions, folder: Path, show_progress: bool) -> Written:
    """Write the state dict under MiniMind's file name, and the tokenizer, into `folder`.

    Raises ModelError for a model that MiniMind does not have, and OSError.
    """
    is_adapter = bool(trained.source.adapter) and not options.merge
    dtype = options.dtype or "float16"
    check_free_space(folder, sum(entry_bytes(entry, DTYPES[dtype]) for entry in trained.stored.entries.values()))
    weights = _adapter(trained) if is_adapter else _model(trained, show_progress)
    weights = {name: value.to(DTYPES[dtype]) for name, value in weights.items()}
    kind = "_moe" if getattr(trained.config, "num_experts", 0) else ""
    name = f"{'lora' if is_adapter else 'full_sft'}_{trained.config.hidden_size}{kind}.pth"
    torch.save(weights, folder / name)
    trained.tokenizer.save_pretrained(folder)
    tokenizer = read_tokenizer(folder, str(folder), trained.trusts_code)
    return Written(
        kind="MiniMind LoRA file" if is_adapter else "MiniMind state dict",
        dtype=dtype,
        bound=dtype,
        load=partial(_load_adapter if is_adapter else _load_model, trained, folder / name),
        prompt_ids=partial(prompt_ids, tokenizer),
        usage=f"```python\nmodel.load_state_dict(torch.load({name!r}, weights_only=True))\n```"
        if not is_adapter
        else f"```python\napply_lora(model)\nload_lora(model, {name!r})\n```",
    )


def _model(trained: TrainedModel, show_progress: bool) -> StateDict:
    """The weights, with the head that MiniMind's files have as well where it is tied."""
    stored = trained.weights()
    with progress_bar("reading", "weights", len(stored.entries), show_progress) as advance:
        weights = {}
        for name in stored.entries:
            weights[name] = stored.read(name)
            advance(1)
    minimind.require_same_model(weights, trained.config, trained.source.name)
    weights.setdefault(minimind.HEAD, weights[minimind.EMBEDDINGS])
    return weights


def _adapter(trained: TrainedModel) -> StateDict:
    adapter = trained.source.adapter
    assert adapter
    if trained.quantized_in:
        raise ModelError(
            f"{trained.source.name}: its adapters were trained over weights in 4 bits, which MiniMind does not have: "
            "merge them (--merge)"
        )
    base = {name: trained.stored.read(name) for name in trained.stored.entries}
    minimind.require_same_model(base, trained.config, trained.source.base.name)
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    try:
        return from_peft(load_file(adapter / "adapter_model.safetensors"), settings, base)
    except ValueError as problem:
        raise ModelError(f"{trained.source.name}: MiniMind's adapters {problem}, or merge it (--merge)") from None


def _load_model(trained: TrainedModel, path: Path) -> Any:
    config, weights = minimind.from_state_dict(read_state_dict(path), str(path))
    with TemporaryDirectory() as folder:
        write_model(Path(folder), config, weights)
        return load_model(Path(folder), config, trained.model.dtype).eval()


def _load_adapter(trained: TrainedModel, path: Path) -> Any:
    base = trained.load_base()
    with TemporaryDirectory() as folder:
        write_peft_folder(read_state_dict(path), str(path), Path(folder))
        return load_adapters(base, Path(folder)).get_base_model()
