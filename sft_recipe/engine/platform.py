"""Selects the platform on which verl computes."""

import os


def select_platform(device: str) -> None:
    """Select the CPU, or this rank's GPU; must run before verl's engine is imported, which fixes verl's platform."""
    if device == "cpu":
        from sft_recipe.engine.cpu.platform import use_cpu

        use_cpu()
    else:
        import torch

        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
