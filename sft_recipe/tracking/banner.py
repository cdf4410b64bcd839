"""The banner: the essential facts of a run, printed before its first step."""

import numpy as np
import torch
from rich.panel import Panel
from rich.table import Table

from sft_recipe.config.auto import compute_dtype, effective_strategy, uses_gradient_checkpointing
from sft_recipe.config.schema import Config
from sft_recipe.data.run_inputs import RunInputs
from sft_recipe.data.token_store import Examples
from sft_recipe.models.memory_estimate import MemoryEstimate
from sft_recipe.models.stats import ModelStats
from sft_recipe.tracking.console import console


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
    adapters = f", LoRA rank {lora.rank}, alpha {lora.alpha:g}" if lora.enabled else ""
    budget = f"micro-batches of up to {data.token_budget:,} tokens on each"
    rate = f"learning rate {config.optim.lr:g}, {config.optim.lr_scheduler_type}"
    rows = {
        "device": _device(config, device),
        "strategy": _strategy(config, device, memory),
        "model": inputs.model.name,
        "parameters": share + adapters,
        **_data_rows(config, inputs),
        "validation": ", ".join(_validation_sets(inputs)) or "none",
        "batches": f"{data.train_batch_size} examples a step over all ranks, {budget}",
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
        table.add_row(name, value)
    console().print(Panel(table, title="Supervised fine-tuning", title_align="left", expand=False))


def _data_rows(config: Config, inputs: RunInputs) -> dict[str, str]:
    train, data = inputs.train, config.data
    tokens, lengths = int(train.lengths.sum()), np.sort(train.lengths)
    share = 100 * train.supervised / tokens
    median, p95 = (int(lengths[int(quantile * (len(lengths) - 1))]) for quantile in (0.5, 0.95))
    ends = " or ".join(inputs.tokenizer.convert_ids_to_tokens(inputs.stop_token_ids()))
    repeated = len(train) - len(np.unique(_digests(train)))
    counts = inputs.source_counts
    sources = ", ".join(f"{source.name} {source.target_count:,} of {source.examples:,}" for source in counts)
    is_mixed = len(counts) > 1 or any(source.target_count != source.examples for source in counts)
    turns = "the last assistant turn" if data.train_on == "last" else "all assistant turns"
    reasoning = "" if data.train_on_reasoning else ", without their reasoning"
    ending = f"up to and including {ends}" if ends else "without an end token: the model will not learn to stop"
    return {
        "data": f"{len(train):,} examples, {tokens:,} tokens" + (f" ({sources})" if is_mixed else ""),
        "supervised": f"loss on {train.supervised:,} tokens ({share:.0f}%): {turns}{reasoning}, {ending}",
        "lengths": f"median {median:,}, p95 {p95:,}, max {lengths[-1]:,} tokens"
        + (f"; {repeated:,} examples repeat others" if repeated else ""),
    }


def _validation_sets(inputs: RunInputs) -> list[str]:
    train, sets = _digests(inputs.train), []
    for name, examples in inputs.validation.items():
        trained = int(np.isin(_digests(examples), train).sum())
        also = f" ({trained:,} of them are also trained on)" if trained else ""
        sets.append(f"{name}: {len(examples):,} examples{also}".removeprefix(": "))
    return sets


def _digests(examples: Examples) -> np.ndarray:
    return examples.store.digests[examples.numbers]


def _verification(config: Config, difference: float | None) -> str:
    if difference is not None:
        return f"loss verified against plain transformers (difference {difference:.0e})"
    if not config.model.verify_first_step:
        return "loss not verified (model.verify_first_step=false)"
    return "loss not verified: ranks share a sequence or a model, or nothing is left to train"


def _device(config: Config, device: str) -> str:
    ranks, machines = config.trainer.world_size, config.trainer.nnodes
    count = f"{ranks} rank{'s' * (ranks > 1)}" + (f" on {machines} machines" if machines > 1 else "")
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {count}"
    threads = torch.get_num_threads()
    return f"CPU, {count} of {threads} thread{'s' * (threads > 1)}"


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
