"""Chooses which weights train, by parts of the model and by names of parameters: model.freeze and model.train_only."""

import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from sft_recipe.config.validation import nearest
from sft_recipe.errors import ConfigError

PARTS = ("encoder", "decoder", "embeddings", "head")
NUMBER = re.compile(r"\.(\d+)(?=\.)")  # of a layer, in the name of a parameter


def freeze_weights(model: nn.Module, freeze: Collection[str], train_only: Collection[str]) -> None:
    """Let those weights train that `train_only` selects (all where it is empty), without those that `freeze` selects.

    An entry is one of PARTS, or a regular expression that is searched for in the parameters' names. The parts do not
    overlap: encoder and decoder are without their embeddings and the head. A weight with several names is one weight:
    it has the first of them, and is frozen with each part that it belongs to.
    Raises ConfigError for an entry that selects nothing, and where nothing is left to train.
    """
    weights = set(model.parameters())
    trained = _select(model, "train_only", train_only) if train_only else weights
    trained = trained - _select(model, "freeze", freeze)
    if not trained:
        raise ConfigError("model.freeze and model.train_only leave no weight to train; remove an entry of model.freeze")
    for weight in weights - trained:
        weight.requires_grad_(False)


def describe_trained(model: nn.Module) -> str:
    """Return the names of what trains: of complete layers the layer's only, with numbers in ranges."""
    trains = {name: weight.requires_grad for name, weight in model.named_parameters()}
    complete = {_layer(name) for name in trains} - {
        _layer(name) for name, is_trained in trains.items() if not is_trained
    }
    shown = dict.fromkeys(
        layer if (layer := _layer(name)) in complete else name for name, is_trained in trains.items() if is_trained
    )
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in shown:
        before, number, after = [*NUMBER.split(f"{name}.", maxsplit=1), "", ""][:3]
        numbers.setdefault((before, after), []).extend([int(number)] if number else [])
    texts = (f"{before}.{_ranges(found)}{after}" if found else before for (before, after), found in numbers.items())
    return ", ".join(text.removesuffix(".") for text in texts)


def _select(model: nn.Module, key: str, entries: Collection[str]) -> set[nn.Parameter]:
    selected = set()
    for entry in entries:
        if entry in PARTS:
            found = _parts(model)[entry]
        else:
            found = {weight for name, weight in model.named_parameters() if re.search(entry, name)}
        if not found:
            raise ConfigError(f"model.{key}: {_explain(model, entry)}")
        selected |= found
    return selected


def _parts(model: Any) -> dict[str, set[nn.Parameter]]:
    weights, head = set(model.parameters()), model.get_output_embeddings()
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not NUMBER.search(f".{name}.")  # T5 has some inside of layers
    ]
    parts = {"embeddings": _weights(tables), "head": _weights([head] if head else [])}
    ends = parts["embeddings"] | parts["head"]
    parts["encoder"] = _weights([model.get_encoder()]) - ends if model.config.is_encoder_decoder else set()
    parts["decoder"] = weights - ends - parts["encoder"]
    return parts


def _weights(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    return {weight for module in modules for weight in module.parameters()}


def _explain(model: nn.Module, entry: str) -> str:
    if entry in PARTS:
        parts = _parts(model)
        present = [part for part in PARTS if parts[part]]
        return f"the model has no {entry}; it has {', '.join(present)}"
    names = {weight: name for name, weight in model.named_parameters()}
    for alias, weight in model.named_parameters(remove_duplicate=False):
        if re.search(entry, alias):
            return f"{alias} is the same weight as {names[weight]}; use that name instead of {entry!r}"
    example = next((name for name in names.values() if NUMBER.search(name)), next(iter(names.values())))
    return (
        f"{entry!r} is found in the name of no parameter (they look like {example}), and is none of the parts "
        f"{', '.join(PARTS)}.{nearest(entry, list(PARTS))}"
    )


def _layer(name: str) -> str:
    """Return the name of the layer that a parameter belongs to; outside of layers its own name."""
    match = NUMBER.search(name)
    return name[: match.end()] if match else name


def _ranges(numbers: list[int]) -> str:
    """Write 0, 1, 2, 5 as 0-2+5."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return "+".join(f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True))
