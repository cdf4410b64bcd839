"""Explains what CUDA, NCCL and the memory of a machine raise as errors of a run: what is wrong, and what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sft_recipe.config.schema import Config
from sft_recipe.errors import PreflightError, RecipeError, TrainingError, first_line

# Patterns of an error's text, and the message; the first that matches counts.
PROBLEMS = (
    (
        r"Duplicate GPU detected",
        "two ranks use the same GPU: CUDA_VISIBLE_DEVICES names one twice, or torchrun starts more ranks than there "
        "are GPUs; set N_GPUS to the number of GPUs that nvidia-smi (rocm-smi) lists",
    ),
    (
        r"/dev/shm|shared memory (segment|object)|</torch_\d+",
        "/dev/shm is too small for the ranks of this machine to communicate: in Docker start the container with "
        "--ipc=host or --shm-size=8g; elsewhere NCCL_SHM_DISABLE=1 avoids it, which is slower",
    ),
    (
        r"(?s)(\bpin(ned)?[ _]memory|HostAlloc|HostRegister).*(out of memory|failed|cannot|not enough)",
        "host memory cannot be pinned for copies from the GPU: raise the container's memory or `ulimit -l`, or save "
        "without copies (trainer.async_save=false) and without offloading (fsdp=fsdp)",
    ),
    (
        r"(?s)nccl.*(out of memory|Failed to CUDA (calloc|malloc)|Cuda failure 2\b)",
        "NCCL found no GPU memory for its buffers, which are not part of PyTorch's: leave it some. {memory}",
    ),
    (r"driver version is insufficient|no kernel image is available", "{text}: this PyTorch does not fit the GPU"),
)


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Inside, an error of the device that a user can mend is a RecipeError; all others pass unchanged."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise TrainingError(f"out of GPU memory. {memory_advice(config)}") from None
    except RecipeError:
        raise
    except RuntimeError as error:
        if message := explain(error, config):
            raise PreflightError(message) from None
        raise


def explain(error: BaseException, config: Config) -> str | None:
    """Return the message for an error, or None where its text is not known."""
    text = str(error)
    for pattern, message in PROBLEMS:
        if re.search(pattern, text, re.IGNORECASE):
            return message.format(memory=memory_advice(config), text=first_line(error))
    return None


def memory_advice(config: Config) -> str:
    """Return what needs less GPU memory, in the order to try it."""
    return (
        f"In this order: MICRO_BATCH_SIZE=1 (now {config.data.micro_batch_size_per_gpu}), a smaller MAX_LENGTH (now "
        f"{config.data.max_length}), --use_lora, --use_qlora, more GPUs (N_GPUS), fsdp=fsdp_offload. Checkpoints "
        "saved before are complete: --resume_from auto continues from the newest."
    )
