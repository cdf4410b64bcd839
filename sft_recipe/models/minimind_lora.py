"""MiniMind's LoRA files: `{module}.lora.A.weight` and `.B.weight`, unscaled, in every square linear layer."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sft_recipe.errors import ModelError
from sft_recipe.files import digest
from sft_recipe.models.conversion import convert_once
from sft_recipe.models.state_dict import StateDict, read_state_dict

RANK = 16
NAME = re.compile(r"(?:module\.)?(.+)\.lora\.([AB])\.weight")
PEFT_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def convert_lora(source: Path, cache_dir: Path) -> Path:
    """Return a folder with the adapter in PEFT's format. Raises ModelError for a file that holds another thing."""
    try:
        key = digest(source)
    except OSError as error:
        raise ModelError(f"{source} cannot be read: {error.strerror or error}") from None
    weights = read_state_dict(source)

    def write(folder: Path) -> None:
        folder.mkdir()
        write_peft_folder(weights, str(source), folder)

    return convert_once(str(source), key, cache_dir, write, marker="adapter_config.json")


def write_peft_folder(weights: StateDict, source: str, folder: Path) -> None:
    """Write an adapter of MiniMind as PEFT does. Raises ModelError, naming `source`, for other weights."""
    matches = {name: NAME.fullmatch(name) for name in weights}
    if wrong := next((name for name, match in matches.items() if match is None), None):
        raise ModelError(
            f"{source} is no LoRA file of MiniMind: {wrong} is not named MODULE.lora.A.weight or .B.weight"
        )
    found = {(match[1], match[2]): weights[name] for name, match in matches.items() if match}
    modules = sorted({module for module, _ in found})
    ranks = {tensor.shape[0 if part == "A" else 1] for (_, part), tensor in found.items()}
    if len(found) != 2 * len(modules) or len(ranks) != 1:
        raise ModelError(f"{source} is no LoRA file of MiniMind: each module needs A and B, all of one rank")
    [rank] = ranks
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,  # PEFT scales by alpha / rank, MiniMind does not
        "target_modules": modules,
    }
    save_file(
        {
            f"base_model.model.{module}.lora_{part}.weight": tensor.contiguous()
            for (module, part), tensor in found.items()
        },
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def from_peft(adapter: StateDict, settings: Mapping[str, Any], base: StateDict) -> StateDict:
    """Return an adapter of PEFT over the weights `base` as MiniMind reads it: every square layer, with rank 16.

    The scale is in B, and missing rows and layers are 0. Raises ValueError, continuing "MiniMind's adapters", for one
    that MiniMind has no place for.
    """
    rank, alpha = settings["r"], settings["lora_alpha"]
    if any(settings.get(key) for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")):
        raise ValueError("are plain LoRA of one rank; train without the other options of PEFT")
    found = {(match[1], match[2]): value for name, value in adapter.items() if (match := PEFT_NAME.fullmatch(name))}
    square = [
        name.removesuffix(".weight") for name, value in base.items() if value.ndim == 2 and len({*value.shape}) == 1
    ]
    modules = {module for module, _ in found}
    if len(found) != len(adapter) or modules - {*square}:
        other = min(modules - {*square}, default="")
        raise ValueError(f"are on square layers only, not on {other}; train with lora.target_modules=[q_proj, o_proj]")
    if rank > RANK:
        raise ValueError(f"have rank {RANK}, not {rank}; train with lora.rank={RANK}")
    result: StateDict = {}
    for module in square:
        size = base[f"{module}.weight"].shape[0]
        a, b = torch.zeros(RANK, size), torch.zeros(size, RANK)
        if module in modules:
            a[:rank], b[:, :rank] = found[module, "A"].float(), found[module, "B"].float() * (alpha / rank)
        result |= {f"{module}.lora.A.weight": a, f"{module}.lora.B.weight": b}
    return result
