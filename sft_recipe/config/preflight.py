"""Checks before anything is loaded: the machine, packages, batch arithmetic, and the output folder."""

import os
import shutil
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

from sft_recipe.config.optimizer import check_optimizer
from sft_recipe.config.schema import Config
from sft_recipe.errors import BITSANDBYTES, LIGER, MEGATRON, CheckpointError, ConfigError, PreflightError, pip_install
from sft_recipe.language import chosen_language, plural

RUN_FILES = ("config.yaml", "data.json", "run.json", "metrics.jsonl", "train.log")  # a run writes these in its folder


def choose_device(config: Config) -> str:
    """Return "cuda" or "cpu".

    Raises PreflightError if the machine has fewer GPUs than the configuration needs, PyTorch cannot use them, or
    variables of the environment name different ones.
    """
    import torch

    from sft_recipe.config import gpus

    if problem := gpus.keep_one_list():
        raise PreflightError(problem)
    requested, wanted = config.trainer.device, config.trainer.n_gpus_per_node
    if requested == "cpu":
        return "cpu"
    available = torch.cuda.device_count()
    if problem := gpus.unusable_gpu_problem(min(wanted, available)) if available else gpus.missing_gpu_problem():
        raise PreflightError(problem)
    if available == 0 and requested == "cuda":
        raise PreflightError("trainer.device=cuda, but PyTorch sees no GPU here; set it to auto or cpu")
    if 0 < available < wanted:
        raise PreflightError(
            f"{wanted} GPUs are requested (N_GPUS), but this machine has {available}; "
            f"set N_GPUS={available}, or train on the CPU with trainer.device=cpu"
        )
    return "cuda" if available else "cpu"


def check(config: Config, device: str) -> None:
    """Raise ConfigError or PreflightError if the configuration cannot work on this machine."""
    check_config(config, device)
    if config.model.use_liger:
        _check_liger(device)
    if config.fsdp.use_torch_compile:
        _check_compilers(device)
    if config.fsdp.strategy == "megatron":
        _check_megatron(device)


def check_config(config: Config, device: str) -> None:
    """Raise ConfigError or PreflightError if the configuration cannot work; `device` may be auto, as configured."""
    chosen_language()
    if not config.data.train_files:
        raise ConfigError("data.train_files is empty; name a file, a glob or a list of those")
    _check_batches(config)
    fsdp = config.fsdp
    if device == "cuda" and fsdp.strategy == "fsdp" and fsdp.fsdp_size == 1 < config.trainer.world_size:
        raise ConfigError(
            "fsdp.fsdp_size=1 with strategy=fsdp: PyTorch's FSDP1 does not add up the gradients of ranks that shard "
            "nothing; use STRATEGY=fsdp2, or another fsdp_size"
        )
    check_optimizer(config, device)
    if config.lora.quantize:
        require_bitsandbytes()
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
    for path in map(folder.joinpath, RUN_FILES):
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} cannot be written: it is not a file; give it another name")
    return folder


def write(path: Path, text: str) -> None:
    """Write a text file. Raises CheckpointError if that fails, for example on a full disk."""
    try:
        path.write_text(text)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from None


def require_bitsandbytes() -> None:
    """Raise PreflightError where bitsandbytes is not installed."""
    if not is_installed("bitsandbytes"):
        raise PreflightError(f"--use_qlora needs bitsandbytes, which is not installed: {pip_install(BITSANDBYTES)}")


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
        raise ConfigError(
            f"{plural(world, 'rank')} cannot be grouped by {sharing}, the product of the parallel sizes of fsdp.*"
        )
    if fsdp.fsdp_size > 0 and fsdp.fsdp_size < world and world % fsdp.fsdp_size:
        raise ConfigError(f"fsdp.fsdp_size={fsdp.fsdp_size} does not divide the {world} ranks")
    ranks = world // sharing
    if config.data.train_batch_size < ranks:
        raise ConfigError(
            f"BATCH_SIZE={config.data.train_batch_size} is smaller than the number of ranks ({ranks}): some would have "
            f"nothing to train; set BATCH_SIZE to {ranks} or more"
        )


def _check_liger(device: str) -> None:
    if device == "cpu":
        raise PreflightError("model.use_liger=true: Liger's kernels run on GPUs, and there is none; set it to false")
    if not is_installed("liger_kernel"):
        raise PreflightError(f"model.use_liger=true needs liger-kernel: {pip_install(LIGER)}, or set it to false")


def _check_compilers(device: str) -> None:
    """Raise PreflightError without what torch.compile uses: a C++ compiler on CPUs, Triton and a C compiler on GPUs."""
    variable, *names = ("CXX", "g++", "clang++") if device == "cpu" else ("CC", "gcc", "clang")
    missing = []
    if device == "cuda" and not is_installed("triton"):
        missing.append(f"triton ({pip_install('triton')})")
    if not any(shutil.which(name) for name in (os.environ.get(variable) or names[0], *names)):
        missing.append(f"{' or '.join(names)} (apt-get install {names[0]})")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing.append("Python.h (apt-get install python3-dev)")
    if missing:
        raise PreflightError(
            f"fsdp.use_torch_compile=true lacks {' and '.join(missing)}; install it, or set it to false"
        )


def _check_megatron(device: str) -> None:
    missing = [name for name in ("megatron.core", "mbridge") if not is_installed(name)]
    problems = [f"{name} is not installed ({pip_install(MEGATRON)})" for name in missing]
    if device == "cpu":
        problems.append("there is no GPU")
    if problems:
        raise PreflightError(f"strategy=megatron cannot run here: {', and '.join(problems)}; use fsdp or fsdp2")
