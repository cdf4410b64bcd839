"""Ranks on several machines, each with a command line of its own, must be one run: checked once, before any weight."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist

from sft_recipe.config.schema import Config
from sft_recipe.errors import CheckpointError, ConfigError

# What may differ between machines: who they are, and where their copies of the same things lie.
NODE_LOCAL_KEYS = {
    "trainer": {
        "n_gpus_per_node",
        "nnodes",
        "node_rank",
        "master_addr",
        "master_port",
        "output_dir",
        "resume_from",
    },
    "data": {"train_files", "val_files", "cache_dir", "num_workers"},
    "model": {"path", "tokenizer_path", "fallback"},
}


def check_consistency(config: Config, identity: dict[str, Any], output_dir: Path) -> None:
    """Collective. Raises ConfigError for machines started differently, CheckpointError for a folder not shared."""
    ours = {
        f"{group}.{key}": value for group, keys in config.model_dump(mode="json").items() for key, value in keys.items()
    }
    ours = {
        key: value
        for key, value in ours.items()
        if key.partition(".")[2] not in NODE_LOCAL_KEYS.get(key.partition(".")[0], ())
    }
    ours |= identity
    everywhere: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, ours)
    first = everywhere[0]
    for rank, theirs in enumerate(everywhere):
        differing = [
            f"  - {key}: {first[key]} on rank 0, {theirs[key]} on rank {rank}"
            for key in first
            if first[key] != theirs[key]
        ]
        if differing:
            raise ConfigError("\n".join(["the machines of this run were started with different settings:", *differing]))
    _check_shared(output_dir)


def share_checkpoint(found: Path | None, folder: Path) -> Path | None:
    """Collective. What rank 0 found to resume from, where this rank sees it; `folder` is the run's checkpoints.

    Raises CheckpointError on all ranks where one of them does not see it.
    """
    told = [(found.name, found.parent.resolve() == folder.resolve(), str(found)) if found else None]
    dist.broadcast_object_list(told)
    if told[0] is None:
        return None
    name, is_ours, path = told[0]
    resume = folder / name if is_ours else Path(path)
    seen: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(seen, resume.is_dir())
    if not all(seen):
        raise CheckpointError(f"rank {seen.index(False)} does not see {path}, which rank 0 resumes from")
    return resume


def _check_shared(output_dir: Path) -> None:
    name = [f".shared-{uuid4().hex}"]
    dist.broadcast_object_list(name)
    probe = output_dir / name[0]
    if dist.get_rank() == 0:
        probe.touch()
    dist.barrier()
    seen: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(seen, probe.exists())
    if dist.get_rank() == 0:
        probe.unlink()
    if not all(seen):
        raise CheckpointError(
            f"{output_dir} is not the same folder on all machines: rank {seen.index(False)} does not see what rank 0 "
            "wrote; checkpoints need an OUTPUT_DIR that all of them share"
        )
