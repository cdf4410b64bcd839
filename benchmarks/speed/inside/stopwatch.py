"""The stopwatch for every environment: it records the first training forward and the end of each optimizer step.

Each rank that steps an optimizer writes $STOPWATCH/rank_N.json after every step. Times are of the monotonic clock,
which all processes of a machine share; memory in bytes. Where torch computes on a GPU a step ends when the GPU is done.
"""

import importlib.util
import json
import os
import re
import sys
import time
from importlib.abc import MetaPathFinder
from pathlib import Path

PAD = 2  # the token that fills rows up; it also ends turns

seen = {"begin": None, "steps": [], "tokens": [], "supervised": [], "peak": [], "gpu_peak": []}
waiting = []  # the inputs of this step's micro-batches, counted when the step has been timed


class _Torch(MetaPathFinder):
    """Calls `arrived` when torch is completely imported. (Others may look for it before it is imported.)"""

    looking = False

    def find_spec(self, name, path=None, target=None):
        if name != "torch" or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            sys.meta_path.remove(self)
            execute(module)
            arrived()

        spec.loader.exec_module = exec_module
        return spec


def wait_for_torch():
    sys.meta_path.insert(0, _Torch())


def arrived():
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def forward(module, _args):
        if module.training and torch.is_grad_enabled():
            seen["begin"] = time.monotonic()
            handle.remove()  # nothing is in the way of the forwards that follow

    handle = register_module_forward_pre_hook(forward)
    register_optimizer_step_post_hook(stepped)


def stepped(*_):
    import torch

    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.synchronize()
    seen["steps"].append(time.monotonic())
    counts = [_count(*inputs) for inputs in waiting]
    waiting.clear()
    seen["tokens"].append(sum(tokens for tokens, _ in counts))
    seen["supervised"].append(sum(supervised for _, supervised in counts))
    seen["peak"].append(_peak())
    seen["gpu_peak"].append(torch.cuda.max_memory_allocated() if on_gpu else 0)
    target = Path(os.environ["STOPWATCH"]) / f"rank_{os.environ.get('RANK', '0')}.json"
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(seen))
    partial.replace(target)


def saw(ids, labels, mask=None):
    """Record a micro-batch: token ids, labels (not shifted, -100: not supervised), attention mask."""
    waiting.append((ids.detach().clone(), labels.detach().clone(), None if mask is None else mask.detach().clone()))


def _count(ids, labels, mask):
    """Count its real tokens and its supervised ones; a row's first token has no prediction."""
    if mask is None:
        real = ids == ids
    elif mask.dim() == 4:  # (rows, 1, n, n): what attends to itself is no padding
        diagonal = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        real = diagonal if diagonal.dtype.is_floating_point is False else diagonal == 0
        real = real.bool()
    else:
        real = mask.bool()
    filler = (ids == PAD) & (labels == -100)  # some masks are 1 on padding
    ending = filler.flip(-1).long().cumprod(-1).flip(-1).bool()
    return int((real & ~ending).sum()), int((labels[..., 1:] != -100).sum())


def _peak():
    """The most resident memory since the program began. (ru_maxrss would also know what forked it.)"""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
