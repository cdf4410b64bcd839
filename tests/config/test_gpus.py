"""Machines with GPUs that this PyTorch does not use, or does not use well: each is one message, or the right choice."""

import os
from types import SimpleNamespace

import pytest
import torch

from sft_recipe.config import auto, gpus, preflight
from sft_recipe.config.compose import load_config
from sft_recipe.engine.cpu.platform import use_cpu
from sft_recipe.errors import PreflightError
from tests.support.runs import run_here

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020)."
CARDS = {
    "T4": ("Tesla T4", (7, 5)),
    "V100": ("Tesla V100-SXM2-16GB", (7, 0)),
    "P100": ("Tesla P100-PCIE-16GB", (6, 0)),
    "3090": ("NVIDIA GeForce RTX 3090", (8, 6)),
    "A100": ("NVIDIA A100-SXM4-80GB", (8, 0)),
    "H100": ("NVIDIA H100 80GB HBM3", (9, 0)),
    "B200": ("NVIDIA B200", (10, 0)),
    "5090": ("NVIDIA GeForce RTX 5090", (12, 0)),
    "MI300X": ("AMD Instinct MI300X", (9, 4)),
}
FA2, FA3, FA4 = "flash_attn", "flash_attn_interface", "flash_attn.cute"
ALL = [FA2, FA3, FA4]
ROCM = "7.1.52802"
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that makes this machine one with device files, a driver, a build of PyTorch and GPUs."""
    for name in gpus.VISIBLE:
        monkeypatch.delenv(name, raising=False)
    auto.flash_attention_runs.cache_clear()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    def make(files=(), driver=None, cuda=None, hip=None, error=None, cards=(), architectures=CUDA_13):
        for name in files:
            (tmp_path / name).touch()
        monkeypatch.setattr(gpus, "NVIDIA_FILES", (f"{tmp_path}/nvidia[0-9]*",))
        monkeypatch.setattr(gpus, "AMD_FILES", (f"{tmp_path}/kfd",))
        text = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Sat Sep 23\n"
        if driver:
            (tmp_path / "version").write_text(text)
        monkeypatch.setattr(gpus, "DRIVER_FILE", tmp_path / "version")
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)

        def init():
            if error:
                raise RuntimeError(error)

        found = [CARDS[card] for card in cards]
        properties = [SimpleNamespace(name=name, major=cap[0], minor=cap[1]) for name, cap in found]
        answers = dict(
            init=init, device_count=lambda: len(found), is_available=lambda: bool(found), current_device=lambda: 0,
            get_device_capability=lambda number=0: found[getattr(number, "index", number) or 0][1],
            get_device_name=lambda number=0: found[number][0],
            get_device_properties=lambda number=0: properties[number], get_arch_list=lambda: architectures,
        )  # fmt: skip
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    return make


def choose(*overrides):
    return preflight.choose_device(load_config(list(overrides)))


@pytest.mark.parametrize(
    ("facts", "texts"),
    [
        (dict(files=["nvidia0"], driver="580.65.06"), ["is not built for it", "whl/cu130", "trainer.device=cpu"]),
        (dict(files=["nvidia0"], driver="550.54.15"), ["is not built for it", "whl/cu126"]),
        (dict(files=["nvidia0"], driver="470.82.01"), ["update the driver to 580"]),
        (dict(files=["nvidia0"]), ["is not built for it", "pip install"]),
        (dict(files=["kfd"]), ["a GPU of AMD", "ROCm"]),
        (
            dict(files=["nvidia0"], driver="535.104.05", cuda="13.0", error=TOO_OLD),
            ["its driver 535.104.05 is too old", "whl/cu126"],
        ),
        (dict(files=["nvidia0"], driver="580.65.06", cuda="13.0"), ["its driver names no device", "nvidia-smi"]),
        (
            dict(files=["nvidia0"], driver="580.65.06", cuda="13.0", error="No CUDA GPUs are available"),
            ["No CUDA GPUs are available", "nvidia-smi"],
        ),
        (dict(cards=["V100"], driver="580.65.06", cuda="13.0"), ["no code for the Tesla V100", "7.0", "whl/cu126"]),
        (dict(cards=["A100"], driver="535.104.05", cuda="13.0", error=TOO_OLD), ["cannot start CUDA", "whl/cu126"]),
        (dict(cards=["MI300X"], hip=ROCM, error=TOO_OLD), ["cannot start ROCm", "rocm-smi"]),
        (dict(files=["kfd"], hip=ROCM), ["this machine's AMD GPU", "rocm-smi"]),
        (dict(files=["kfd", "nvidia0"], driver="550.54.15", hip=ROCM), ["this machine's AMD GPU", "rocm-smi"]),
    ],
)
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_pytorch_does_not_use_is_an_error_with_the_remedy(machine, facts, texts, device):
    machine(**facts)
    with pytest.raises(PreflightError) as caught:
        choose(f"trainer.device={device}")
    assert [text for text in texts if text not in str(caught.value)] == []
    if facts.get("hip"):
        assert [text for text in ("nvidia-smi", "CUDA", "pip install", "580") if text in str(caught.value)] == []
    assert choose("trainer.device=cpu") == "cpu"


def test_without_a_gpu_training_runs_on_the_cpu(machine):
    machine()
    assert choose() == "cpu"


def test_of_equal_lists_of_gpus_one_stays(machine, monkeypatch):
    """SLURM sets one for each vendor; verl refuses two."""
    machine()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "0,1")
    choose()
    assert "ROCR_VISIBLE_DEVICES" not in os.environ and os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "2")
    with pytest.raises(PreflightError, match="CUDA_VISIBLE_DEVICES=0,1 and ROCR_VISIBLE_DEVICES=2 differ: set only"):
        choose()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_a_variable_hides_are_no_problem(machine, monkeypatch, hidden):
    machine(files=["nvidia0"], driver="580.65.06")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert choose() == "cpu"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("T4", "fp16"), ("V100", "fp16"), ("P100", "fp32"), ("3090", "bf16"), ("A100", "bf16"), ("H100", "bf16"),
        ("MI300X", "bf16"),
    ],
)  # fmt: skip
def test_compute_dtype_is_one_that_the_gpu_multiplies(machine, monkeypatch, card, expected):
    build = dict(hip=ROCM) if card == "MI300X" else dict(cuda="13.0", architectures=["sm_60", "sm_70", *CUDA_13])
    machine(cards=[card], driver="580.65.06", **build)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda *_: True)  # by emulation
    assert choose() == "cuda" and auto.compute_dtype(load_config([]).fsdp, "cuda") == expected


@pytest.mark.parametrize(
    ("card", "installed", "working", "dtype", "expected"),
    [
        ("A100", ALL, ALL, "auto", "flash_attention_2"),
        ("A100", [], [], "auto", auto.PACKED_ATTENTION),
        ("A100", [FA2], [], "auto", auto.PACKED_ATTENTION),
        ("A100", [FA2], [FA2], "fp32", auto.PACKED_ATTENTION),
        ("T4", ALL, ALL, "auto", auto.PACKED_ATTENTION),
        ("H100", ALL, ALL, "auto", "flash_attention_4"),
        ("H100", [FA2, FA3], [FA2, FA3], "auto", "flash_attention_3"),
        ("H100", ALL, [FA2, FA3], "auto", "flash_attention_3"),
        ("H100", ALL, [FA2], "auto", "flash_attention_2"),
        ("H100", ALL, ALL, "fp32", auto.PACKED_ATTENTION),
        ("B200", ALL, ALL, "auto", "flash_attention_4"),
        ("B200", [FA2, FA3], [FA2, FA3], "auto", "flash_attention_2"),
        ("5090", ALL, ALL, "auto", "flash_attention_2"),
        ("MI300X", ALL, ALL, "auto", "flash_attention_2"),
        ("MI300X", [FA2], [], "auto", auto.PACKED_ATTENTION),
        ("MI300X", [], [], "auto", auto.PACKED_ATTENTION),
    ],
)
def test_flash_attention_is_tried_and_replaced_where_it_fails(
    machine, monkeypatch, caplog, card, installed, working, dtype, expected
):
    machine(cards=[card], **(dict(hip=ROCM) if card == "MI300X" else dict(driver="580.65.06", cuda="13.0")))
    modules = {name: module for name, module, _ in auto.FLASH_ATTENTION}
    monkeypatch.setattr(auto, "_is_installed", lambda name: modules[name] in installed)
    monkeypatch.setattr(auto, "import_module", lambda name: SimpleNamespace(flash_attn_varlen_func=name))

    tried = []

    def attend(name, head_size):
        tried.append(name)
        if name not in working:
            raise ImportError("undefined symbol: _ZN3c104cuda")

    monkeypatch.setattr(auto, "_attend", attend)
    config = load_config([f"fsdp.mixed_precision.param_dtype={dtype}"])
    assert auto.attention(config, "cuda") == expected
    failed = [name for name in tried if name not in working]
    assert all(name in caplog.text and "undefined symbol" in caplog.text for name in failed)


def test_names_of_flash_attention_are_those_of_transformers():
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX as KNOWN
    from transformers.utils import import_utils

    assert {name for name, _, _ in auto.FLASH_ATTENTION} == {f"flash_attention_{number}" for number in KNOWN}
    for number in KNOWN:
        assert callable(getattr(import_utils, f"is_flash_attn_{number}_available"))
        assert auto._is_installed(f"flash_attention_{number}") is False  # here


@pytest.mark.parametrize("is_mac", [True, False])
def test_a_mac_trains_on_its_cpu_and_says_so(machine, monkeypatch, model_dir, tmp_path, capsys, is_mac):
    machine()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: is_mac)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    data = tmp_path / "data.json"
    data.write_text('[{"prompt": "Hello", "response": "Hi"}]')
    settings = ["data.train_batch_size=1", "trainer.total_training_steps=1", f"data.cache_dir={tmp_path}/cache"]
    arguments = [f"model.path={model_dir}", f"data.train_files={data}", f"trainer.output_dir={tmp_path}/out", *settings]
    use_cpu()
    assert run_here(*arguments) == 0
    shown = capsys.readouterr().out
    assert shown.count("this Mac's GPU (MPS) is not supported: training runs on the CPU") == is_mac


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((8, 9), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_90", "compute_120"], True),
        ((7, 0), CUDA_13, False),
        ((12, 0), ["sm_90"], False),
        ((8, 0), [], True),
    ],
)
def test_code_runs_on_its_generation_and_ptx_on_later_ones(capability, architectures, expected):
    assert gpus.has_kernels(capability, architectures) is expected
