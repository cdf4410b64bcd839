"""check_sft_ready.py on machines with GPUs that are not here: what it reports of them, in one page of JSON."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft_recipe.cli import check
from sft_recipe.readiness import machine as machine_checks
from tests.config.test_gpus import CARDS, TOO_OLD, machine  # noqa: F401
from tests.support import tiny

GIB = 2**30
MEMORY = {"T4": 15, "3090": 24, "A100": 80, "H100": 80}


@pytest.fixture
def ask(tmp_path, capsys, monkeypatch):
    """Return a function: the exit code and the checks, by name, of a run on this machine with these flags."""
    monkeypatch.setattr(machine_checks, "SLOW_DISK", 0)
    model = tiny.build_model(tmp_path / "model")
    records = [{"prompt": f"What is {i} and {i}?", "response": f"It is {2 * i}."} for i in range(100)]
    (tmp_path / "train.json").write_text(json.dumps(records))

    def run(*words):
        places = [f"--model={model}", f"--train_data={tmp_path}/train.json", f"--output_dir={tmp_path}/out"]
        code = check.main(["--json", *places, f"data.cache_dir={tmp_path}/cache", *words])
        return code, {item["name"]: item for item in json.loads(capsys.readouterr().out)["checks"]}

    return run


@pytest.fixture
def use(machine, monkeypatch):  # noqa: F811
    """Return a function that makes this machine one with this GPU, a new driver and a build of PyTorch for it."""

    def make(card):
        machine(files=["nvidia0"], cards=[card], driver="580.65.06", cuda="13.0")
        name, (major, minor) = CARDS[card]
        properties = SimpleNamespace(name=name, major=major, minor=minor, total_memory=MEMORY[card] * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number=0: properties)

    return make


@pytest.mark.parametrize(("card", "dtype"), [("T4", "fp16"), ("3090", "bf16"), ("A100", "bf16"), ("H100", "bf16")])
def test_gpu_and_what_it_computes_in_are_reported(ask, use, card, dtype):
    use(card)
    code, checks = ask()
    name, (major, minor) = CARDS[card]
    facts = f"1 x {name}, {MEMORY[card]}.0 GiB, compute capability {major}.{minor}; driver 580.65.06, CUDA 13.0"
    assert checks["device"]["message"] == facts
    assert f"of {MEMORY[card]}.0 GiB" in checks["memory"]["message"] and f"in {dtype}," in checks["memory"]["message"]
    assert code == 0 and all(item["status"] != "error" for item in checks.values())


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (dict(driver="535.104.05", cuda="13.0", error=TOO_OLD), "driver 535.104.05 is too old"),
        (dict(driver="580.65.06"), "is not built for it"),
    ],
)
def test_gpu_that_pytorch_does_not_use_is_an_error(ask, machine, facts, text):  # noqa: F811
    machine(files=["nvidia0"], **facts)
    code, checks = ask()
    assert code == 2 and checks["device"]["status"] == "error" and text in checks["device"]["message"]


def test_full_disk_is_an_error(ask, use, monkeypatch):
    use("H100")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=GIB, used=GIB, free=2**20))
    code, checks = ask()
    assert code == 2 and checks["disk"]["status"] == "error"
    assert (
        checks["disk"]["message"]
        == "up to 3 checkpoints more at a time, of 559.62 KB: 1.68 MB are needed, 1.05 MB are free"
    )


def test_missing_shard_is_an_error(ask, use, tmp_path):
    use("A100")
    AutoModelForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "model", max_shard_size="50KB")
    (tmp_path / "model/model.safetensors").unlink()
    shard = sorted((tmp_path / "model").glob("model-*.safetensors"))[1]
    shard.unlink()
    code, checks = ask()
    assert code == 2 and shard.name in checks["model"]["message"]
