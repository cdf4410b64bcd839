"""The banner: the essential facts of a run, printed before its first step; and those that its report shows."""

import shutil
from typing import Any

import numpy as np
import torch
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sft_recipe.config.auto import compute_dtype, effective_strategy, uses_gradient_checkpointing
from sft_recipe.config.schema import Config
from sft_recipe.data.run_inputs import RunInputs
from sft_recipe.data.token_store import Examples
from sft_recipe.distributed.host_memory import available_memory
from sft_recipe.language import plural
from sft_recipe.models.memory_estimate import GIB, MemoryEstimate
from sft_recipe.models.stats import ModelStats
from sft_recipe.tracking.console import console
from sft_recipe.tracking.run_facts import PREDICTED_MEMORY, STRATEGY


def print_banner(
    config: Config,
    inputs: RunInputs,
    device: str,
    stats: ModelStats,
    memory: MemoryEstimate | None,
    steps_per_epoch: int,
    total_steps: int,
    resumed_step: int,
    loss_difference: float | None,
) -> None:
    """Print the banner.

    `resumed_step` is the step that the run resumes after, or 0; `loss_difference` that of the first micro-batch from
    plain transformers, None where it was not compared.
    """
    data, lora = config.data, config.lora
    share = f"{stats.trainable:,} trainable of {stats.total:,} ({100 * stats.trainable / stats.total:.2f}%)"
    method = "QLoRA" if lora.quantize else "LoRA"
    adapters = f", {method} rank {lora.rank}, alpha {lora.alpha:g}" if lora.enabled else ""
    adapters += f", {stats.quantized:,} in 4 bits (NF4)" if lora.quantize else ""
    padding = ", padding counted," if data.has_targets else ""
    budget = f"micro-batches of up to {data.token_budget:,} tokens{padding} on each"
    rate = f"learning rate {config.optim.lr:g}, {config.optim.lr_scheduler_type}"
    rows = {
        "run": config.trainer.name,
        **_recipe_row(config),
        "device": describe_device(config, device),
        "free": _free(config, device),
        "strategy": _strategy(config, device, memory),
        "model": inputs.model.name,
        "parameters": share + adapters,
        **({"trained": stats.trained} if stats.trained else {}),
        **_data_rows(config, inputs),
        "validation": ", ".join(_validation_sets(inputs)) or "none",
        "batches": f"{plural(data.train_batch_size, 'example')} a step over all ranks, {budget}",
        "steps": f"{total_steps:,} ({steps_per_epoch:,} an epoch), {rate}",
        "first step": _verification(config, loss_difference),
        "output": config.trainer.output_dir,
    }
    if resumed_step:
        rows["resumed"] = f"after step {resumed_step:,}"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))  # no markup: [encoder] is a value
    console().print(Panel(table, title="Supervised fine-tuning", title_align="left", expand=False))


def starting_facts(
    config: Config, model: str, device: str, stats: ModelStats, memory: MemoryEstimate | None
) -> dict[str, Any]:
    """Return model, device, strategy, precision, parameters, and the estimated memory of a rank, None if unknown."""
    needed = memory and memory.needed(uses_gradient_checkpointing(config, device))
    return {
        "model": model,
        "device": describe_device(config, device),
        STRATEGY: _sharding(config, device),
        "dtype": compute_dtype(config.fsdp, device),
        "parameters": stats.total,
        "trainable": stats.trainable,
        PREDICTED_MEMORY: needed and round(needed / GIB, 4),
        "device_memory_gb": memory and round(memory.device / GIB, 4),
    }


def _data_rows(config: Config, inputs: RunInputs) -> dict[str, str]:
    data = config.data
    found = inputs.statistics(data.truncation)
    share, lengths = 100 * found.supervised / found.tokens, found.lengths
    ends = " or ".join(inputs.tokenizer.convert_ids_to_tokens(inputs.stop_token_ids()))
    counts = inputs.source_counts
    sources = ", ".join(f"{source.name} {source.target_count:,} of {source.examples:,}" for source in counts)
    is_mixed = len(counts) > 1 or any(source.target_count != source.examples for source in counts)
    turns = "the last assistant turn" if data.train_on == "last" or data.split_turns is True else "all assistant turns"
    reasoning = "" if data.train_on_reasoning else ", without their reasoning"
    ending = f"up to and including {ends}" if ends else "without an end token: the model will not learn to stop"
    return {
        "data": f"{plural(found.examples, 'example')}, {found.tokens:,} tokens" + (f" ({sources})" if is_mixed else ""),
        "supervised": f"loss on {found.supervised:,} tokens ({share:.0f}%): {turns}{reasoning}, {ending}",
        "lengths": f"median {lengths['median']:,}, p95 {lengths['p95']:,}, max {lengths['max']:,} tokens"
        + (_longest_parts(inputs.train) if data.has_targets else "")
        + (f"; {plural(found.repeated, 'exact duplicate')}" if found.repeated else ""),
    }


def _longest_parts(train: Examples) -> str:
    sources = train.source_lengths
    return f" (sources up to {sources.max():,}, answers up to {(train.lengths - sources).max():,})"


def _validation_sets(inputs: RunInputs) -> list[str]:
    train, sets = _digests(inputs.train), []
    for name, examples in inputs.validation.items():
        trained = int(np.isin(_digests(examples), train).sum())
        also = f" ({trained:,} of them are also trained on)" if trained else ""
        sets.append(f"{name}: {plural(len(examples), 'example')}{also}".removeprefix(": "))
    return sets


def _digests(examples: Examples) -> np.ndarray:
    return examples.store.digests[examples.numbers]


def _verification(config: Config, difference: float | None) -> str:
    if difference is not None:
        return f"loss verified against plain transformers (difference {difference:.1e})"
    if not config.model.verify_first_step:
        return "loss not verified (model.verify_first_step=false)"
    return "loss not verified: ranks share a sequence or a model, or nothing is left to train"


def describe_device(config: Config, device: str) -> str:
    """Return the device of the ranks and their number, as text."""
    ranks, machines = config.trainer.world_size, config.trainer.nnodes
    count = plural(ranks, "rank") + (f" on {machines} machines" if machines > 1 else "")
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {count}"
    threads = torch.get_num_threads()
    return f"CPU, {count} of {plural(threads, 'thread')}"


def _recipe_row(config: Config) -> dict[str, str]:
    if config.trainer.recipe is None:
        return {}
    changes = f", changed: {', '.join(config.changes)}" if config.changes else ", unchanged"
    return {"recipe": config.trainer.recipe + changes}


def _free(config: Config, device: str) -> str:
    memory = torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory()
    disk = shutil.disk_usage(config.trainer.run_folder).free
    return f"{memory / GIB:.1f} GiB of memory, {disk / GIB:.1f} GiB of disk for the run folder"


def _strategy(config: Config, device: str, memory: MemoryEstimate | None) -> str:
    is_checkpointing = uses_gradient_checkpointing(config, device)
    checkpointing = "on" if is_checkpointing else "off"
    estimate = f" ({memory.describe(is_checkpointing)})" if memory else ""
    dtype = compute_dtype(config.fsdp, device)
    return f"{_sharding(config, device)}, {dtype}, gradient checkpointing {checkpointing}{estimate}"


def _sharding(config: Config, device: str) -> str:
    if device == "cpu" and config.trainer.world_size == 1 and config.fsdp.strategy != "megatron":
        return "no FSDP (one CPU rank holds the complete model)"
    used = effective_strategy(config.fsdp, device)
    return used if used == config.fsdp.strategy else f"{used} ({config.fsdp.strategy} does not run on a CPU)"
