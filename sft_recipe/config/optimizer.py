"""Checks the optimizer before anything is loaded: its class, and all its arguments, on two small parameters."""

import inspect
from importlib import import_module
from typing import Any

from sft_recipe.config.foreign_names import OPTIMIZERS, find_optimizer, optimizer_overrides
from sft_recipe.config.optim import OptimConfig
from sft_recipe.config.schema import Config
from sft_recipe.config.validation import nearest
from sft_recipe.errors import BITSANDBYTES, ConfigError, PreflightError, pip_install

# Of torch.optim; the others of its optimizers train and resume.
UNSUITABLE = {
    "LBFGS": "it computes the loss several times per step",
    "Muon": "it trains matrices only, and models have vectors as well",
    "Rprop": "it needs the gradient of all data in every step",
    "SparseAdam": "it needs sparse gradients",
}
ADAM = ("Adam", "AdamW")
MEGATRON_SCHEDULES = ("cosine", "linear", "constant")


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
        check_schedule(config)
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
    if is_of_bitsandbytes(optim):
        _check_blocks(config, device)
    _check_arguments(optim, optimizer_class)


def check_schedule(config: Config) -> None:
    """Raise ConfigError for a schedule that the strategy does not have."""
    optim = config.optim
    has_all = config.fsdp.strategy != "megatron"
    if not has_all and (optim.lr_scheduler_type not in MEGATRON_SCHEDULES or not optim.zero_indexed_step):
        raise ConfigError(
            f"strategy=megatron has its own schedules: optim.lr_scheduler_type must be one of "
            f"{', '.join(MEGATRON_SCHEDULES)}, with optim.zero_indexed_step=true"
        )


def is_of_bitsandbytes(optim: OptimConfig) -> bool:
    """Return whether the optimizer is one of bitsandbytes, whose 8-bit state has a scale per block of 256 numbers."""
    return optim.optimizer_impl.startswith("bitsandbytes")


def _check_blocks(config: Config, device: str) -> None:
    name = config.optim.optimizer
    if config.trainer.world_size > 1:
        raise ConfigError(
            f"optim.optimizer={name} of bitsandbytes has blocks of state that several ranks cannot share; train on one "
            "rank (N_GPUS=1), or use AdamW, whose state several ranks divide"
        )
    if device == "cuda" and config.fsdp.strategy == "fsdp2":
        raise ConfigError(f"optim.optimizer={name} of bitsandbytes does not know fsdp2's tensors; use strategy=fsdp")
    if not name.startswith("Paged"):
        return
    if device == "cpu":
        raise ConfigError(
            f"optim.optimizer={name} moves its state between a GPU and the host, and this run is on a CPU; use "
            f"{name.removeprefix('Paged')}"
        )
    if config.fsdp.optimizer_offload:
        raise ConfigError(f"optim.optimizer={name} moves its state itself; set fsdp.optimizer_offload=false")


def further_arguments(optim: OptimConfig) -> dict[str, Any]:
    """Return the arguments of the class beyond verl's own: the user's, and for PyTorch's Adam the fused kernel.

    That takes one pass over memory instead of ten; an implementation that the user chose is kept.
    """
    chosen = dict(optim.override_optimizer_config or {})
    if _is_pytorchs_adam(optim) and "foreach" not in chosen:
        chosen.setdefault("fused", True)
    return chosen


def optimizer_state_size(optim: OptimConfig) -> float:
    """Return how many numbers of the weights' dtype the optimizer keeps for each weight: 2 for Adam, 0 for plain SGD.

    Others than Adam with its defaults are tried on one matrix. Those that cannot be tried without a GPU count as Adam.
    """
    if optim.optimizer in ADAM and not optim.override_optimizer_config:
        return 2
    import torch

    weight = torch.nn.Parameter(torch.zeros(128, 128))
    weight.grad = torch.zeros_like(weight)
    try:
        optimizer: Any = _optimizer_class(optim)([weight], lr=optim.lr, **further_arguments(optim))
        if is_of_bitsandbytes(optim):  # a step would start OpenMP, which must not run before a fork
            optimizer.init_state(optimizer.param_groups[0], weight, 0, 0)
        else:
            optimizer.step()
    except Exception:  # of a library that needs a GPU
        return 2
    state = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in state) / weight.nbytes


def _is_pytorchs_adam(optim: OptimConfig) -> bool:
    return optim.optimizer_impl == "torch.optim" and optim.optimizer in ADAM


def _optimizer_class(optim: OptimConfig) -> type:
    from torch.optim import Optimizer

    try:
        module = import_module(optim.optimizer_impl)
    except (ImportError, ValueError, TypeError):  # the last two for names such as "" and ".x"
        raise PreflightError(
            f"optim.optimizer_impl={optim.optimizer_impl} cannot be imported; is it installed?"
            + (f" {pip_install(BITSANDBYTES)} installs it" if is_of_bitsandbytes(optim) else "")
        ) from None
    found = getattr(module, optim.optimizer, None)
    if not isinstance(found, type) or found is Optimizer:
        classes = {name: value for name, value in vars(module).items() if isinstance(value, type)}
        known = [name for name, value in classes.items() if issubclass(value, Optimizer) and value is not Optimizer]
        meant = find_optimizer(optim.optimizer)
        if meant and OPTIMIZERS[meant][1] != optim.optimizer_impl:
            raise ConfigError(
                f"optim.optimizer: {optim.optimizer_impl} has no optimizer {optim.optimizer}; set "
                f"{' '.join(optimizer_overrides(meant)) or 'optim.optimizer_impl=torch.optim'}"
            )
        raise ConfigError(
            f"optim.optimizer: {optim.optimizer_impl} has no optimizer {optim.optimizer}; it has "
            f"{', '.join(sorted(set(known) - UNSUITABLE.keys()))}.{nearest(optim.optimizer, known)}"
        )
    return found


def _check_arguments(optim: OptimConfig, optimizer_class: type) -> None:
    import torch

    name = f"{optim.optimizer_impl}.{optim.optimizer}"
    arguments: dict[str, Any] = {"lr": optim.lr, "weight_decay": optim.weight_decay}
    if any(word in optim.optimizer.lower() for word in ("adam", "ademamix")):  # as verl does
        arguments["betas"] = optim.betas
    if twice := next((key for key in arguments if key in (optim.override_optimizer_config or {})), None):
        raise ConfigError(f"optim.override_optimizer_config has {twice}, which has its key: set optim.{twice}")
    accepted = inspect.signature(optimizer_class).parameters
    if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in accepted.values()):
        known = [key for key in accepted if key not in ("params", *arguments)]
        for key in optim.override_optimizer_config or {}:
            if key not in known:
                raise ConfigError(
                    f"optim.override_optimizer_config has {key}, which {name} does not accept; it has "
                    f"{', '.join(known)}.{nearest(str(key), known)}"
                )
    parameters = [torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))]
    try:
        optimizer_class(parameters, **{**arguments, **further_arguments(optim)})
    except Exception as error:  # the optimizers of libraries raise anything for a value that they refuse
        raise ConfigError(f"optim.*: {name} refuses its arguments: {str(error).strip()}") from None
