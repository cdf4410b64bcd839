"""The row of metrics of an optimizer step, with its share of the device's peak (MFU)."""

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sft_recipe.data.token_store import Examples
from sft_recipe.models.peak_flops import measured_peak_flops, peak_flops
from sft_recipe.models.stats import Products
from sft_recipe.training.schedule import Schedule


class StepMetrics:
    """Makes the rows of a run on `train`; `skipped_steps` counts those whose gradients were not finite.

    `epoch_loss` holds the sums over the steps of the current epoch: of negative log-likelihoods, and of tokens.
    """

    epoch_loss: tuple[float, int] = (0.0, 0)

    def __init__(
        self,
        schedule: Schedule,
        train: Examples,
        products: Products | None,
        device: str,
        dtype: torch.dtype,
        skipped_steps: int,
    ):
        """`products` counts the model's matrix products, where known; `dtype` is the one they are computed in."""
        self.schedule = schedule
        self.train = train
        self.products = products
        self.device = device
        self.dtype = dtype
        self.skipped_steps = skipped_steps

    def row(
        self, step: int, indices: np.ndarray, metrics: dict[str, Any], learning_rate: float, seconds: float
    ) -> dict[str, Any]:
        """Return the row of `step`, which trained the examples `indices` in `seconds` with verl's `metrics`."""
        self.skipped_steps += not math.isfinite(metrics["grad_norm"])
        lengths = self.train.lengths[indices]
        tokens = int(lengths.sum())
        targets = lengths - self.train.source_lengths[indices]
        supervised = int(targets.sum())
        aux_loss = {"train/aux_loss": metrics["aux_loss"]} if "aux_loss" in metrics else {}
        return self._epoch_loss(step, metrics["loss"], supervised) | {
            "step": step,
            "epoch": round(self.schedule.epoch(step), 4),
            "train/loss": metrics["loss"],
            **aux_loss,
            "train/grad_norm": metrics["grad_norm"],
            "train/lr": learning_rate,
            "train/tokens": tokens,
            "train/supervised_tokens": supervised,
            "train/skipped_steps": self.skipped_steps,
            "perf/seconds": round(seconds, 4),
            "perf/tokens_per_s": tokens / seconds,
            "perf/mfu": self._mfu(lengths, targets, seconds),
            "perf/memory_gb": metrics["perf/max_memory_allocated_gb"],
        }

    def _epoch_loss(self, step: int, loss: float, supervised: int) -> dict[str, float]:
        """Add a step to the mean loss of its epoch; returns that mean after the epoch's last step."""
        nll, tokens = self.epoch_loss
        if math.isfinite(loss):
            nll, tokens = nll + loss * supervised, tokens + supervised
        is_complete = self.schedule.ends_epoch(step)
        self.epoch_loss = (0.0, 0) if is_complete else (nll, tokens)
        return {"train/epoch_loss": nll / tokens} if is_complete and tokens else {}

    def _mfu(self, lengths: np.ndarray, supervised: np.ndarray, seconds: float) -> float | None:
        """Return the share of the matrix products' peak (see models/flops.py); None where sizes are unknown."""
        if self.products is None:
            return None
        return self.products.step_flops(lengths, supervised) / seconds / self._peak_flops / dist.get_world_size()

    @cached_property
    def _peak_flops(self) -> float:
        """FLOP/s of this rank's device: the vendor's for a known GPU, else measured, after the first step."""
        known = peak_flops(torch.cuda.get_device_name(), self.dtype) if self.device == "cuda" else None
        return known or measured_peak_flops(self.dtype, self.device)
