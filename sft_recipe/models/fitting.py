"""Finds settings with which a run that exceeds its memory would fit, each verified."""

from collections.abc import Callable, Iterator
from itertools import combinations

from sft_recipe.config.schema import Config

SHORTEST = 256  # tokens; shorter examples are not advised
MOST_OPTIONS = 4


def fitting_options(config: Config, fits: Callable[[Config], bool], on_gpus: bool) -> list[str]:
    """Return up to four ways to fit, as flags and overrides; an empty list where none is known. `fits` verifies each.

    Each is one change where one suffices, else two or three together.
    """
    for count in (1, 2, 3):
        found: list[str] = []
        for changes in combinations(_changes(config, on_gpus), count):
            if option := _first_that_fits(config, changes, fits):
                found.append(option)
            if len(found) == MOST_OPTIONS:
                break
        if found:
            return found
    return []


# A change: the values that it may take, from the least to the most drastic, as (text, keys of the configuration).
_Change = list[tuple[str, dict[str, object]]]


def _changes(config: Config, on_gpus: bool) -> Iterator[_Change]:
    data, trainer = config.data, config.trainer
    if sizes := _halves(data.micro_batch_size_per_gpu):
        yield [(f"--micro_batch_size {size}", {"data.micro_batch_size_per_gpu": size}) for size in sizes]
    lengths = [SHORTEST * 2**power for power in range(12, -1, -1) if SHORTEST * 2**power < data.max_length]
    if lengths:
        yield [(f"--max_length {length}", {"data.max_length": length}) for length in lengths]
    if adapters := list(_adapters(config)):
        yield adapters
    if on_gpus:
        yield [_gpus(config, count) for count in (2, 4, 8, 16, 32, 64) if count > trainer.world_size]
    if on_gpus and not config.fsdp.offload_policy:
        yield [("fsdp=fsdp2_offload", {"fsdp.strategy": "fsdp2", "fsdp.offload_policy": True})]


def _adapters(config: Config) -> Iterator[tuple[str, dict[str, object]]]:
    if not config.lora.enabled:
        yield "--use_lora", {"lora.enabled": True}
    if not config.lora.quantize and not config.data.has_targets:
        strategy = "" if config.fsdp.strategy == "fsdp2" else " --strategy fsdp2"
        yield f"--use_qlora{strategy}", {"lora.enabled": True, "lora.quantize": True, "fsdp.strategy": "fsdp2"}


def _halves(count: int) -> list[int]:
    return [count // 2**power for power in range(1, count.bit_length())]


def _gpus(config: Config, count: int) -> tuple[str, dict[str, object]]:
    nodes, per_node = max(1, count // 8), min(count, 8)
    batch = max(config.data.train_batch_size, count)  # each rank needs an example
    text = f"--n_gpus {per_node}" + (f" --nnodes {nodes}" if nodes > 1 else "")
    text += f" --batch_size {batch}" if batch > config.data.train_batch_size else ""
    return text, {"trainer.n_gpus_per_node": per_node, "trainer.nnodes": nodes, "data.train_batch_size": batch}


def _first_that_fits(config: Config, changes: tuple[_Change, ...], fits: Callable[[Config], bool]) -> str | None:
    """The least drastic values of `changes` that fit: of the last change as little as possible, of the others all."""
    *others, last = changes
    fixed = [values[-1] for values in others]
    for chosen in last:
        keys = {key: value for _, values in (*fixed, chosen) for key, value in values.items()}
        if fits(changed(config, keys)):
            return " ".join(text for text, _ in (*fixed, chosen))
    return None


def changed(config: Config, keys: dict[str, object]) -> Config:
    """Return the configuration with other values of `keys`, written as group.key."""
    groups: dict[str, dict[str, object]] = {}
    for key, value in keys.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = value
    updates = {name: getattr(config, name).model_copy(update=values) for name, values in groups.items()}
    return config.model_copy(update=updates)
