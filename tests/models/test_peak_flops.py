"""The peak of a GPU's matrix products: the vendor's by name, else measured."""

import pytest
import torch

from sft_recipe.models.peak_flops import measured_peak_flops, peak_flops


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H100 NVL", torch.float16, 835),
        ("NVIDIA H200", torch.bfloat16, 989),
        ("NVIDIA B200", torch.bfloat16, 2250),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5),
        ("NVIDIA A10", torch.bfloat16, 125),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA GeForce RTX 3090", torch.bfloat16, 71),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA GeForce RTX 5090", torch.bfloat16, 209.5),
        ("Tesla T4", torch.float16, 65),
        ("Tesla V100-SXM2-32GB", torch.float16, 125),
        ("AMD Instinct MI300X", torch.bfloat16, 1307),
        ("AMD Instinct MI300X", torch.float32, 163),
        ("AMD Instinct MI250X/MI250", torch.bfloat16, 191.5),
    ],
)
def test_peak_of_a_known_gpu_is_its_vendors(name, dtype, tera):
    assert peak_flops(name, dtype) == tera * 1e12


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1080", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A1000"])
def test_peak_of_another_gpu_is_not_guessed(name):
    assert peak_flops(name, torch.bfloat16) is None


def test_fp32_products_in_tf32_have_its_peak():
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12
    finally:
        torch.set_float32_matmul_precision("highest")


def test_measured_peak_flops_is_plausible():
    assert 1e8 < measured_peak_flops(torch.float32, "cpu", size=256, seconds=0.05) < 1e15
