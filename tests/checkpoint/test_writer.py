"""What the shards of a state hold: safetensors as its own library reads them, digested while they are written."""

import json
import tracemalloc

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from xxhash import xxh3_128

from sft_recipe.checkpoint.writer import DTYPES, write_safetensors
from sft_recipe.files import BLOCK
from tests.support import tiny
from tests.support.small_run import arguments, checkpoints


def test_file_is_what_safetensors_reads_and_has_its_fingerprint(tmp_path):
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(7.5), "empty": torch.zeros(0, 4), "odd": torch.zeros(3, dtype=torch.uint8)}
    tensors |= {"transposed": torch.randn(4, 6).T, "many blocks": torch.randn(BLOCK // 4 + 3)}
    path = tmp_path / "shard.safetensors"
    found = write_safetensors(path, tensors, {"format": "pt"})
    assert found == [path.stat().st_size, xxh3_128(path.read_bytes()).hexdigest()]
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype and read[name].shape == value.shape
        found, expected = (tensor.reshape(-1).view(torch.uint8) for tensor in (read[name], value))
        assert found.equal(expected), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_systems_that_cannot_drop_pages_write_the_same_file(tmp_path, monkeypatch):
    """macOS has no posix_fadvise; the file is larger than what is dropped at once."""
    tensors = {"a": torch.arange(1000, dtype=torch.int64)}
    monkeypatch.setattr("sft_recipe.checkpoint.writer.FLUSHED", 1)
    expected = write_safetensors(tmp_path / "with", tensors, {})
    monkeypatch.delattr("os.posix_fadvise")
    assert write_safetensors(tmp_path / "without", tensors, {}) == expected
    assert (tmp_path / "without").read_bytes() == (tmp_path / "with").read_bytes()


def test_tensors_are_aligned(tmp_path):
    """For programs that map the file: each tensor begins at a multiple of its element's size."""
    write_safetensors(
        tmp_path / "a", {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(5), "long": torch.zeros(1)}, {}
    )
    content = (tmp_path / "a").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    assert begin % 8 == 0 and all(header[name]["data_offsets"][0] % 4 == 0 for name in ("b", "long"))


def test_writing_needs_no_memory_for_a_copy(tmp_path):
    tensor = torch.zeros(16 * BLOCK, dtype=torch.uint8)
    tracemalloc.start()
    try:
        write_safetensors(tmp_path / "a", {"a": tensor}, {})
        assert tracemalloc.get_traced_memory()[1] < BLOCK
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ranks", [2, 3])
def test_exported_model_of_several_ranks_is_the_state_that_torch_reads(warm, tmp_path, ranks):
    model = tiny.build_model(tmp_path / "model")
    end = warm.run(arguments(model, tmp_path, "trainer.total_training_steps=1", "fsdp.strategy=fsdp2"), ranks=ranks)
    assert end.code == 0, end.output
    checkpoint = tmp_path / "out/checkpoints" / checkpoints(tmp_path)[-1]
    assert len(list((checkpoint / "state").iterdir())) == ranks
    exported = load_file(checkpoint / "huggingface/model.safetensors")
    expected = {f"model.{name}": torch.full_like(value, torch.nan) for name, value in exported.items()}
    dcp.load(expected, storage_reader=HuggingFaceStorageReader(str(checkpoint / "state")), no_dist=True)
    assert exported and all(value.equal(expected[f"model.{name}"]) for name, value in exported.items())
