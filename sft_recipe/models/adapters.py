"""Adds LoRA's adapters to a model, and checks the modules that lora.target_modules and lora.exclude_modules name."""

import re
from collections.abc import Collection
from typing import Any

from sft_recipe.config.lora import ALL_LINEAR, LoraConfig
from sft_recipe.config.validation import nearest
from sft_recipe.errors import ConfigError
from sft_recipe.models.families import family_of
from sft_recipe.models.loading import freeze_other_modalities


def add_adapters(
    model: Any, rank: int, alpha: float, targets: str | Collection[str], excluded: str | Collection[str] | None
) -> Any:
    """Return peft's model around `model`: its weights are frozen, and adapters in fp32 are trained.

    Raises ConfigError where peft refuses `targets`.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    settings: Any = dict(r=rank, lora_alpha=alpha, target_modules=targets, exclude_modules=excluded)
    try:
        adapted: Any = get_peft_model(model, PeftLoraConfig(task_type=family_of(model.config).task_type, **settings))
    except ValueError as error:
        raise ConfigError(f"lora.target_modules={targets}: {str(error).splitlines()[0]}") from None
    freeze_other_modalities(adapted)
    return adapted


def check_embeddings(model: Any) -> None:
    """Raise ConfigError where embeddings that FSDP2 would wrap by themselves have adapters: it cannot wrap those."""
    from peft.tuners.lora.layer import Embedding

    if not model.config.tie_word_embeddings and any(isinstance(module, Embedding) for module in model.modules()):
        raise ConfigError(
            "lora.target_modules names the embeddings, and fsdp2 cannot divide their adapters where the head has other "
            "weights; leave them out of lora.target_modules"
        )


def check_modules(lora: LoraConfig, names: Collection[str]) -> None:
    """Raise ConfigError for every pattern that matches none of `names`, the dotted names of the model's modules.

    peft would ignore all but the last of several: a text is a regular expression that matches complete names
    (model.layers.0.self_attn.q_proj), an entry of a list a complete name or the end of one (q_proj).
    """
    for key, patterns in (("target_modules", lora.target_modules), ("exclude_modules", lora.exclude_modules)):
        if unknown := unknown_modules(patterns, names):
            raise ConfigError(f"lora.{key}: {_explain(patterns, unknown, names)}")


def unknown_modules(patterns: str | Collection[str] | None, names: Collection[str]) -> list[str]:
    """Return those of the patterns of lora.target_modules or lora.exclude_modules that match none of `names`."""
    if patterns is None or (isinstance(patterns, str) and patterns.lower() == ALL_LINEAR):
        return []
    if isinstance(patterns, str):
        return [] if any(re.fullmatch(patterns, name) for name in names) else [patterns]
    return [part for part in patterns if not any(f".{name}".endswith(f".{part}") for name in names)]


def _explain(patterns: str | Collection[str] | None, unknown: list[str], names: Collection[str]) -> str:
    parents = {name.rpartition(".")[0] for name in names}
    leaves = sorted({name.rpartition(".")[2] for name in names if name and name not in parents})
    parts = re.split(r"[,\s\[\]]+", patterns.strip("[] ")) if isinstance(patterns, str) else unknown
    hints = "".join(nearest(part, [*leaves, ALL_LINEAR]) for part in parts if part not in leaves)
    known = f"The model has {', '.join(leaves)}."
    if not isinstance(patterns, str):
        return f"the model has no module {', '.join(unknown)}.{hints} {known}"
    example = next((name for name in names if name.endswith(f".{parts[0]}")), max(names, key=len))
    return (
        f"{patterns!r} is a regular expression that must match a complete name such as {example}, and matches none. "
        f"Modules are listed by name like this: [{', '.join(parts)}].{hints} {known}"
    )
