"""Binds a process to the ranks that were launched, and joins and leaves their process group."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sft_recipe.config.schema import Config
from sft_recipe.errors import ConfigError


def bind_to_launched_ranks(config: Config) -> Config:
    """Return the configuration with the number of ranks that are running: torchrun's, or this process alone.

    Without torchrun, sets the environment variables that torchrun would set. Raises ConfigError if the configuration
    asks for several ranks and this is the only one.
    """
    trainer = config.trainer
    if all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        local, world = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ["WORLD_SIZE"])
        changes = {"n_gpus_per_node": local, "nnodes": max(1, world // local)}
        return config.model_copy(update={"trainer": trainer.model_copy(update=changes)})
    if trainer.world_size > 1:
        raise ConfigError(
            f"trainer.n_gpus_per_node={trainer.n_gpus_per_node} and trainer.nnodes={trainer.nnodes} need "
            f"{trainer.world_size} processes, and this is only one: start with ./train.sh, or with "
            f"torchrun --nproc_per_node={trainer.n_gpus_per_node} -m sft_recipe.main_sft ..."
        )
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", str(trainer.master_port or 0))  # 0: the store chooses a free port
    return config


@contextmanager
def process_group(device: str, world_size: int) -> Iterator[None]:
    """Join the default process group for the duration of the context; verl's worker uses the group that exists.

    `device` is "cuda" or "cpu".
    """
    import torch

    join_process_group(device)
    try:
        yield
    finally:
        # After an error on one of several ranks the others may be stuck in a collective; leaving the process ends that.
        if sys.exc_info()[0] is None or world_size == 1:
            torch.distributed.destroy_process_group()


def join_process_group(device: str) -> None:
    """Initialize the default process group as verl would, over a store that works after a restart of the ranks."""
    import torch

    from sft_recipe.distributed.watchdog import COLLECTIVE_TIMEOUT, open_store

    store = open_store("process group")
    store.set_timeout(COLLECTIVE_TIMEOUT)  # machines may prepare their data for hours
    torch.distributed.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=COLLECTIVE_TIMEOUT,
    )
