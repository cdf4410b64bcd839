"""Checks before anything is loaded: the machine, packages, batch arithmetic, and the output folder."""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from sft_recipe.config.optimizer import check_optimizer
from sft_recipe.config.schema import Config
from sft_recipe.errors import CheckpointError, ConfigError, PreflightError


def choose_device(config: Config) -> str:
    """Return "cuda" or "cpu". Raises PreflightError if the machine has fewer GPUs than the configuration needs."""
    import torch

    requested = config.trainer.device
    available = torch.cuda.device_count() if requested != "cpu" else 0
    if available == 0 and requested == "cuda":
        raise PreflightError("trainer.device=cuda, but PyTorch sees no GPU here; set it to auto or cpu")
    if 0 < available < config.trainer.n_gpus_per_node:
        raise PreflightError(
            f"{config.trainer.n_gpus_per_node} GPUs are requested (N_GPUS), but this machine has {available}; "
            f"set N_GPUS={available}, or train on the CPU with trainer.device=cpu"
        )
    return "cuda" if available else "cpu"


def check(config: Config, device: str) -> None:
    """Raise ConfigError or PreflightError if the configuration cannot work on this machine."""
    check_config(config, device)
    if config.fsdp.strategy == "megatron":
        _check_megatron(device)


def check_config(config: Config, device: str) -> None:
    """Raise ConfigError or PreflightError if the configuration cannot work; `device` may be auto, as configured."""
    _check_batches(config)
    check_optimizer(config, device)
    if config.model.attn_implementation != "auto" or device != "auto":
        from sft_recipe.config.auto import shares_prefixes  # imports PyTorch, which takes seconds

        shares_prefixes(config, device)


def writable_folder(folder: Path) -> Path:
    """Create the run folder if needed and return it. Raises CheckpointError if it cannot be written."""
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".writable-", dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(f"the output folder {folder} cannot be written: {error.strerror or error}") from None
    return folder


def write(path: Path, text: str) -> None:
    """Write a text file. Raises CheckpointError if that fails, for example on a full disk."""
    try:
        path.write_text(text)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from None


def is_installed(name: str) -> bool:
    """Return True if a package or module is installed; imports only its parent packages."""
    try:
        return name in sys.modules or find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _check_batches(config: Config) -> None:
    fsdp, world = config.fsdp, config.trainer.world_size
    sharing = fsdp.ulysses_sequence_parallel_size
    if fsdp.strategy == "megatron":
        sharing = fsdp.tensor_model_parallel_size * fsdp.pipeline_model_parallel_size * fsdp.context_parallel_size
    if world % sharing:
        raise ConfigError(f"{world} ranks cannot be grouped by {sharing}, the product of the parallel sizes of fsdp.*")
    if fsdp.fsdp_size > 0 and fsdp.fsdp_size < world and world % fsdp.fsdp_size:
        raise ConfigError(f"fsdp.fsdp_size={fsdp.fsdp_size} does not divide the {world} ranks")
    ranks = world // sharing
    if config.data.train_batch_size < ranks:
        raise ConfigError(
            f"BATCH_SIZE={config.data.train_batch_size} is smaller than the number of ranks ({ranks}): some would have "
            f"nothing to train; set BATCH_SIZE to {ranks} or more"
        )


def _check_megatron(device: str) -> None:
    missing = [name for name in ("megatron.core", "mbridge") if not is_installed(name)]
    problems = [f"{name} is not installed (pip install -e '.[megatron]')" for name in missing]
    if device == "cpu":
        problems.append("there is no GPU")
    if problems:
        raise PreflightError(f"strategy=megatron cannot run here: {', and '.join(problems)}; use fsdp or fsdp2")
