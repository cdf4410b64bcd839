"""The state of bitsandbytes' optimizers, by the names of the weights.

Their state_dict hides what has not the shape of the weight, and torch's distributed checkpointing would leave it out.
"""

from typing import Any

import torch

STEP = "step"  # an integer; all else are tensors
CONSTANTS = ("qmap1", "qmap2")  # the values that 8 bits stand for, which the optimizer sets itself


class BlockwiseState:
    """Stores and restores the state of an optimizer of bitsandbytes on a single rank."""

    def __init__(self, module: torch.nn.Module, optimizer: Any):
        self.optimizer = optimizer
        self.names = {weight: plain_name(name) for name, weight in module.named_parameters() if weight.requires_grad}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the state, to be stored or loaded into; makes a state where there is none."""
        found = {}
        for number, group in enumerate(self.optimizer.param_groups):
            for index, weight in enumerate(group["params"]):
                if weight not in self.names:
                    continue
                if not self.optimizer.state[weight]:
                    self.optimizer.init_state(group, weight, number, index)
                for key, value in self.optimizer.state[weight].items():
                    if key not in CONSTANTS:
                        found[f"state.{self.names[weight]}.{key}"] = torch.tensor(value) if key == STEP else value
        return found

    def set_steps(self, loaded: dict[str, torch.Tensor]) -> None:
        """Set the number of steps of each weight to what was loaded into `tensors`."""
        for weight, name in self.names.items():
            self.optimizer.state[weight][STEP] = int(loaded[f"state.{name}.{STEP}"])


def plain_name(name: str) -> str:
    """Return the name of a weight as state dictionaries spell it: without what FSDP1 adds."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")
