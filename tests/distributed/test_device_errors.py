"""What CUDA, NCCL and a machine's memory raise is one message with the remedy."""

import pytest
import torch

from sft_recipe.config.compose import load_config
from sft_recipe.distributed.device_errors import explained
from sft_recipe.errors import ConfigError, RecipeError

CASES = {
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1a000": "N_GPUS",
    "NCCL Error 2: unhandled system error. Error while creating shared memory segment /dev/shm/nccl-X (size 9637888)": (
        "--shm-size"
    ),
    "unable to write to file </torch_7_1>: No space left on device (28)": "--shm-size",
    "No space left on device": None,
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc 4194304": "MAX_LENGTH",
    "NCCL WARN Cuda failure 2 'out of memory'": "not part of PyTorch's",
    "CUDA error: out of memory in pinned memory allocation: cudaHostAlloc failed": "async_save=false",
    "CUDA error: no kernel image is available for execution on the device": "does not fit the GPU",
}


@pytest.mark.parametrize(("text", "remedy"), CASES.items())
def test_errors_of_devices_have_their_remedy(text, remedy):
    with pytest.raises(RuntimeError if remedy is None else RecipeError) as caught, explained(load_config([])):
        raise RuntimeError(text)
    assert remedy is None or remedy in str(caught.value)


def test_out_of_memory_names_what_to_reduce_with_its_value():
    with pytest.raises(RecipeError) as caught, explained(load_config(["data.max_length=777"])):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert str(caught.value).startswith("out of GPU memory. In this order: MICRO_BATCH_SIZE=1")
    assert "MAX_LENGTH (now 777)" in str(caught.value)


@pytest.mark.parametrize(
    "error", [ValueError("out of memory"), ConfigError("Duplicate GPU detected"), RuntimeError("x")]
)
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, explained(load_config([])):
        raise error
    assert caught.value is error
