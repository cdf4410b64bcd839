"""Checks the optimizer before anything is loaded: its class, and all its arguments, on two small parameters."""

import inspect
from importlib import import_module
from typing import Any

from sft_recipe.config.schema import Config, OptimConfig
from sft_recipe.config.validation import nearest
from sft_recipe.errors import ConfigError, PreflightError

# Of torch.optim; the others of its optimizers train and resume.
UNSUITABLE = {
    "LBFGS": "it computes the loss several times per step",
    "Muon": "it trains matrices only, and models have vectors as well",
    "Rprop": "it needs the gradient of all data in every step",
    "SparseAdam": "it needs sparse gradients",
}
ADAM = ("Adam", "AdamW")


def check_optimizer(config: Config, device: str) -> None:
    """Raise ConfigError for an optimizer or an argument of it that cannot work, PreflightError if it is not installed.

    `device` is where the run trains, or the configured one.
    """
    optim = config.optim
    if config.fsdp.strategy == "megatron":
        if optim.optimizer not in ADAM or optim.override_optimizer_config:
            raise ConfigError(
                "strategy=megatron has its own Adam: remove optim.optimizer and override_optimizer_config"
            )
        return
    if _is_pytorchs_adam(optim) and not optim.override_optimizer_config:
        return  # the limits of the keys suffice, and importing PyTorch takes seconds
    from sft_recipe.config.auto import effective_strategy

    optimizer_class = _optimizer_class(optim)
    if optim.optimizer_impl == "torch.optim" and optim.optimizer in UNSUITABLE:
        raise ConfigError(f"optim.optimizer={optim.optimizer} cannot train here: {UNSUITABLE[optim.optimizer]}")
    is_sharded = config.trainer.world_size > 1 or device == "cuda"
    if optim.optimizer == "Adafactor" and is_sharded and effective_strategy(config.fsdp, device) == "fsdp2":
        raise ConfigError("optim.optimizer=Adafactor needs complete matrices, and fsdp2 shards them; use AdamW")
    _check_arguments(optim, optimizer_class)


def further_arguments(optim: OptimConfig) -> dict[str, Any]:
    """Return the arguments of the class beyond verl's own: the user's, and for PyTorch's Adam the fused kernel.

    That takes one pass over memory instead of ten; an implementation that the user chose is kept.
    """
    chosen = dict(optim.override_optimizer_config or {})
    if _is_pytorchs_adam(optim) and "foreach" not in chosen:
        chosen.setdefault("fused", True)
    return chosen


def _is_pytorchs_adam(optim: OptimConfig) -> bool:
    return optim.optimizer_impl == "torch.optim" and optim.optimizer in ADAM


def _optimizer_class(optim: OptimConfig) -> type:
    from torch.optim import Optimizer

    try:
        module = import_module(optim.optimizer_impl)
    except (ImportError, ValueError, TypeError):  # the last two for names such as "" and ".x"
        raise PreflightError(
            f"optim.optimizer_impl={optim.optimizer_impl} cannot be imported; is it installed?"
        ) from None
    found = getattr(module, optim.optimizer, None)
    if not isinstance(found, type) or found is Optimizer:
        classes = {name: value for name, value in vars(module).items() if isinstance(value, type)}
        known = [name for name, value in classes.items() if issubclass(value, Optimizer) and value is not Optimizer]
        raise ConfigError(
            f"optim.optimizer: {optim.optimizer_impl} has no optimizer {optim.optimizer}; it has "
            f"{', '.join(sorted(set(known) - UNSUITABLE.keys()))}.{nearest(optim.optimizer, known)}"
        )
    return found


def _check_arguments(optim: OptimConfig, optimizer_class: type) -> None:
    import torch

    name = f"{optim.optimizer_impl}.{optim.optimizer}"
    accepted = inspect.signature(optimizer_class).parameters
    if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in accepted.values()):
        for key in optim.override_optimizer_config or {}:
            if key not in accepted:
                known = [name for name in accepted if name != "params"]
                raise ConfigError(
                    f"optim.override_optimizer_config has {key}, which {name} does not accept; it has "
                    f"{', '.join(known)}.{nearest(str(key), known)}"
                )
    arguments: dict[str, Any] = {"lr": optim.lr, "weight_decay": optim.weight_decay}
    if any(word in optim.optimizer.lower() for word in ("adam", "ademamix")):  # as verl does
        arguments["betas"] = optim.betas
    parameters = [torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))]
    try:
        optimizer_class(parameters, **{**arguments, **further_arguments(optim)})
    except Exception as error:  # the optimizers of libraries raise anything for a value that they refuse
        raise ConfigError(f"optim.*: {name} refuses its arguments: {str(error).strip()}") from None
