"""Whether a run finds room on its devices, with or without gradient checkpointing: told before any weight is read."""

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from sft_recipe.config import Config
from sft_recipe.engine.loss import PART
from sft_recipe.engine.verl_config import compute_dtype, uses_gradient_checkpointing
from sft_recipe.errors import PreflightError
from sft_recipe.memory import Plan, plan_memory
from sft_recipe.training.shape import Shape

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container
ADVICE = (
    "In this order: a smaller MICRO_BATCH_SIZE or MAX_LENGTH, --use_lora, more GPUs (N_GPUS), fsdp=fsdp2_offload; "
    "see README.md, Out of memory"
)


def choose_checkpointing(
    config: Config, shape: Shape, longest: int, device: str, say: Callable[[str], None]
) -> tuple[Config, Plan | None]:
    """Collective. The configuration with `auto` decided: on only where memory would not do without.

    It goes by what devices have, not by what is free, so that a resumed run decides likewise; and all ranks by the
    smallest device. No plan, and no decision, where the model's sizes are not known or Megatron trains it.
    Raises PreflightError where not even weights and optimiser state fit.
    """
    if shape.layout is None or config.fsdp.strategy == "megatron":
        return config, None
    width = {"bf16": 2, "fp32": 4}[compute_dtype(config.fsdp, device)]
    memory = torch.tensor(device_memory(device))
    dist.all_reduce(memory, op=dist.ReduceOp.MIN)
    sizes = shape.layout, shape.total, shape.trainable
    plan = plan_memory(config, *sizes, width, device == "cpu", longest, PART[device], int(memory))
    if config.model.enable_gradient_checkpointing == "auto":
        model = config.model.model_copy(update={"enable_gradient_checkpointing": not plan.fits(checkpointing=False)})
        config = config.model_copy(update={"model": model})
    chosen = uses_gradient_checkpointing(config, device)
    told = f"a rank {plan.told(chosen)}. {ADVICE}"
    if plan.weights + plan.optimizer > plan.device:
        raise PreflightError(f"not even weights and optimiser state fit: {told}")
    if not plan.fits(chosen):
        say(f"Memory may run out: {told}.")
    return config, plan


def device_memory(device: str) -> int:
    """Bytes that this rank may use, in all: of its GPU, or its share of this machine's or container's memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    found = [Path(path).read_text().strip() for path in CGROUP_LIMITS if Path(path).is_file()]
    limits = [int(text) for text in found if text.isdigit()]
    return min([psutil.virtual_memory().total, *limits]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
