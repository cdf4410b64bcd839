"""Checks that the ranks of all machines, which have separate command lines, are one run; before weights are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist

from sft_recipe.config.schema import Config
from sft_recipe.errors import CheckpointError, ConfigError

# Keys that may differ between machines: their addresses and numbers, and paths of local copies.
NODE_LOCAL_KEYS = {
    "trainer": {
        "n_gpus_per_node",
        "nnodes",
        "node_rank",
        "master_addr",
        "master_port",
        "start_timeout",
        "auto_restart",
        "output_dir",
        "resume_from",
        "recipe",
    },
    "data": {"train_files", "val_files", "cache_dir", "num_workers"},
    "model": {"path", "tokenizer_path", "fallback"},
}


def different_keys(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """Return the keys of both whose values differ: an older version did not record all of them.

    Of a model, `NAME (DIGEST)`, only the digest counts: the same model may be at different places.
    """

    def content(key: str, value: Any) -> Any:
        return value.rpartition(" (")[2] if key == "model" else value

    return [key for key in actual if key in expected and content(key, expected[key]) != content(key, actual[key])]


def check_consistency(config: Config, identity: dict[str, Any], output_dir: Path) -> None:
    """Compare configuration, identity and output folder of all ranks; collective.

    Raises ConfigError for machines with different settings, CheckpointError for a folder that they do not share.
    """
    settings = {
        f"{group}.{key}": value for group, keys in config.model_dump(mode="json").items() for key, value in keys.items()
    }
    settings = {
        key: value
        for key, value in settings.items()
        if key.partition(".")[2] not in NODE_LOCAL_KEYS.get(key.partition(".")[0], ())
    }
    settings |= identity
    gathered: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, settings)
    first = gathered[0]
    for rank, other in enumerate(gathered):
        differences = [
            f"  - {key}: {first[key]} on rank 0, {other[key]} on rank {rank}" for key in different_keys(first, other)
        ]
        if differences:
            title = "the machines of this run were started with different settings:"
            raise ConfigError("\n".join([title, *differences]))
    _check_shared(output_dir)


def share_checkpoint(checkpoint: Path | None, folder: Path) -> Path | None:
    """Return rank 0's `checkpoint` as this rank's path; collective. `folder` holds the checkpoints of this run.

    Raises CheckpointError on all ranks where one of them cannot see it.
    """
    if checkpoint:
        is_own = checkpoint.parent.resolve() == folder.resolve()
        shared: list[Any] = [(checkpoint.name, is_own, str(checkpoint))]
    else:
        shared = [None]
    dist.broadcast_object_list(shared)
    if shared[0] is None:
        return None
    name, is_own, path = shared[0]
    resume = folder / name if is_own else Path(path)
    visible: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(visible, resume.is_dir())
    if not all(visible):
        raise CheckpointError(f"rank {visible.index(False)} does not see {path}, which rank 0 resumes from")
    return resume


def _check_shared(output_dir: Path) -> None:
    name = [f".shared-{uuid4().hex}"]
    dist.broadcast_object_list(name)
    probe = output_dir / name[0]
    if dist.get_rank() == 0:
        probe.touch()
    dist.barrier()
    visible: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(visible, probe.exists())
    if dist.get_rank() == 0:
        probe.unlink()
    if not all(visible):
        raise CheckpointError(
            f"{output_dir} is not the same folder on all machines: rank {visible.index(False)} does not see what "
            "rank 0 wrote; checkpoints need an OUTPUT_DIR that all of them share"
        )
