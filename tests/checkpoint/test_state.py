"""What a checkpoint stores of a model, and how ranks fail and disagree together."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from tests.support import tiny
from tests.support.runs import run_here

RECORDS = [{"prompt": f"Say {i}.", "response": f"{i}."} for i in range(6)]


def arguments(folder, output, *extra):
    (folder / "data.json").write_text(json.dumps(RECORDS))
    return [
        f"model.path={folder}/model",
        f"data.train_files={folder}/data.json",
        f"data.cache_dir={folder}/cache",
        f"trainer.output_dir={output}",
        "trainer.device=cpu",
        "trainer.total_training_steps=1",
        *extra,
    ]


def stored_names(output):
    names = set()
    for path in (output / "checkpoints/step_1/state").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


@pytest.mark.parametrize("tied", [True, False])
def test_lora_checkpoint_stores_adapters_only(tmp_path, tied):
    tiny.build_model(tmp_path / "model", tie_word_embeddings=tied)
    assert run_here(*arguments(tmp_path, tmp_path / "out", "lora=r8")) == 0
    weights = {name for name in stored_names(tmp_path / "out") if name.startswith("model.")}
    assert len(weights) == 28 and all("lora_" in name for name in weights)


def test_tied_weights_are_stored_once(tmp_path):
    tiny.build_model(tmp_path / "model")
    assert run_here(*arguments(tmp_path, tmp_path / "out")) == 0
    names = stored_names(tmp_path / "out")
    assert "model.model.embed_tokens.weight" in names and "model.lm_head.weight" not in names


def test_copies_of_tied_weights_are_restored():
    """As FSDP1 hands them out: one copy under each name."""
    from sft_recipe.checkpoint.state import restore_tied

    loaded, stale = torch.ones(2), torch.zeros(2)
    model = {"model.embed_tokens.weight": loaded, "lm_head.weight": stale}
    restore_tied(model, {"lm_head.weight": "model.embed_tokens.weight"})
    assert model["lm_head.weight"] is loaded


def fill_disk(rank: int) -> None:
    """A setup: the folder of step 2 cannot be synchronized to disk."""
    from sft_recipe.checkpoint import manager

    sync = manager.sync

    def fail(path):
        if path.name == ".step_2.partial":
            raise OSError(28, "No space left on device")
        sync(path)

    manager.sync = fail


def test_failed_save_is_reported_once_and_keeps_earlier_checkpoints(warm, tmp_path):
    tiny.build_model(tmp_path / "model")
    output = tmp_path / "out"
    run = arguments(tmp_path, output, "trainer.total_training_steps=2", "trainer.save_freq=1")
    end = warm.run(run, ranks=2, setup=(f"{__name__}:fill_disk", {}))
    assert end.code != 0
    assert end.output.count("error: step 2 cannot be saved") == 1 and "No space left" in end.output
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_1"]


def test_ranks_with_different_settings_are_refused(warm, tmp_path):
    """Two machines may have different command lines; here, two ranks read different variables."""
    tiny.build_model(tmp_path / "model")
    end = warm.run(arguments(tmp_path, tmp_path / "out", "optim.lr=1${oc.env:RANK}.0"), ranks=2)
    assert end.code != 0
    assert "optim.lr: 10.0 on rank 0, 11.0 on rank 1" in end.output


def test_folders_that_are_not_shared_are_refused(warm, tmp_path):
    tiny.build_model(tmp_path / "model")
    end = warm.run(arguments(tmp_path, f"{tmp_path}/out-${{oc.env:RANK}}"), ranks=2)
    assert end.code != 0
    assert "is not the same folder on all machines" in end.output


def test_copies_are_not_pinned_where_the_host_cannot(monkeypatch, caplog):
    from sft_recipe.engine.cpu.platform import use_cpu

    use_cpu()
    from sft_recipe.checkpoint import state

    made = []

    def empty_like(tensor, device, pin_memory=False):
        made.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory (cudaHostAlloc)")
        return torch.zeros(1)

    monkeypatch.setattr(state.torch, "empty_like", empty_like)
    saver = state.FsdpState(SimpleNamespace(module=None, optimizer=None), is_lora=False, group=None)
    for _ in range(2):
        saver._host_memory(SimpleNamespace(is_cuda=True))
    assert made == [True, False, False] and caplog.text.count("cannot be pinned") == 1


def test_pinned_copies_take_powers_of_two(monkeypatch):
    from sft_recipe.checkpoint import state

    weights = [torch.nn.Parameter(torch.zeros(count)) for count in (1024, 1025, 0)]
    optimizer = SimpleNamespace(state={weights[0]: {"step": torch.zeros(()), "exp_avg": torch.zeros(1500)}})
    engine = SimpleNamespace(module=SimpleNamespace(parameters=lambda: weights), optimizer=optimizer)
    saved = state.FsdpState(engine, is_lora=False, group=None)
    assert saved.size() == saved.copies_size() == 4 * (1024 + 1025 + 1 + 1500)
    monkeypatch.setattr(state, "get_device_name", lambda: "cuda")
    assert saved.copies_size() == 4096 + 8192 + 4 + 8192
    saved.can_pin = False
    assert saved.copies_size() == saved.size()
