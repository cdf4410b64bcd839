"""The engine and batches of one rank without a training run, for benchmarks of the training step."""

import os
import socket
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorData, TensorDict

from sft_recipe.config import preflight
from sft_recipe.config.compose import load_config
from sft_recipe.data.batching import batch_indices, plan_micro_batches


class OneRank:
    """Builds the engine of a configuration (Hydra overrides) in this process, and the batches of its data."""

    def __init__(self, overrides: list[str]):
        self.config = load_config(overrides)
        self.device = preflight.choose_device(self.config)
        self._join()
        from sft_recipe.data.run_inputs import prepare

        self.prepared = prepare(self.config, 0, say=print)
        self.engine = self.build()

    def batch(self, step: int) -> TensorDict:
        """Return the batch of step `step` (from 0), planned as in a run."""
        data, train = self.config.data, self.prepared.train
        numbers = batch_indices(step, len(train), data.train_batch_size, self.config.trainer.seed, data.order)
        [plan] = plan_micro_batches(train.lengths[numbers], 1, data.token_budget)
        documents = [train[numbers[index]] for part in plan for index in part]
        parts = {
            "input_ids": [ids for ids, _ in documents],
            "loss_mask": [mask for _, mask in documents],
            "position_ids": [np.arange(len(ids)) for ids, _ in documents],
        }
        tensors: dict[str, Any] = {
            name: torch.nested.as_nested_tensor(
                [torch.from_numpy(array.astype(np.int64)) for array in arrays], layout=torch.jagged
            )
            for name, arrays in parts.items()
        }
        batch = TensorDict(tensors, batch_size=[len(documents)])
        batch["micro_batch_docs"] = NonTensorData([len(part) for part in plan])
        return batch

    def train(self, batch: TensorDict) -> dict[str, Any]:
        """Run one optimizer step; returns the engine's result."""
        with self.engine.train_mode():
            return self.engine.train_batch(batch, None)

    def _join(self) -> None:
        with socket.socket() as server:
            server.bind(("localhost", 0))
            port = server.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        if self.device == "cpu":
            from sft_recipe.engine.cpu.platform import use_cpu

            use_cpu()
        torch.distributed.init_process_group("gloo" if self.device == "cpu" else "nccl")

    def build(self) -> Any:
        """Build another engine of the same configuration."""
        from sft_recipe.config.auto import shares_prefixes
        from sft_recipe.engine.sft_engine import SFTEngine
        from sft_recipe.engine.verl_config import build_verl_config

        built = build_verl_config(self.config, self.prepared.model.folder, 1000, self.device)
        built.model.model_type = "language_model"
        built.engine.use_remove_padding = True
        engine = SFTEngine(
            model_config=built.model,
            engine_config=built.engine,
            optimizer_config=built.optim,
            checkpoint_config=built.checkpoint,
        )
        torch.manual_seed(self.config.trainer.seed)
        engine.initialize()
        engine.shares_prefixes = shares_prefixes(self.config, self.device)
        return engine
