"""The matrix products per second that vendors state for their GPUs, dense, and the measured ones of other GPUs."""

import re
import time

import torch

TERA = 1e12
# bf16 and fp16, TF32, fp32. The first name that the GPU's contains is used, so that longer ones come first. Of GPUs for
# games, the rates are those with sums in fp32, which are half of those with sums in fp16.
PEAKS = {
    "B200": (2250, 1100, 75),
    "GB200": (2500, 1250, 80),
    "H200": (989, 494, 67),
    "H100 NVL": (835, 418, 60),
    "H100 PCIe": (756, 378, 51),
    "H100": (989, 494, 67),
    "H800": (989, 494, 67),
    "H20": (148, 74, 44),
    "A100": (312, 156, 19.5),
    "A800": (312, 156, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A30": (165, 82, 10.3),
    "A10G": (70, 35, 35),
    "A10": (125, 62.5, 31.2),
    "L40S": (362, 183, 91.6),
    "L40": (181, 90.5, 90.5),
    "L4": (121, 60, 30.3),
    "RTX 6000 Ada": (364, 182, 91.1),
    "RTX A6000": (154.8, 77.4, 38.7),
    "RTX 5090": (209.5, 104.8, 104.8),
    "RTX 5080": (112.6, 56.3, 56.3),
    "RTX 5070 Ti": (87.9, 43.9, 43.9),
    "RTX 5070": (61.7, 30.9, 30.9),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 4080": (97.5, 48.7, 48.7),
    "RTX 4070 Ti": (80.2, 40.1, 40.1),
    "RTX 4070": (58.3, 29.1, 29.1),
    "RTX 4060 Ti": (44.1, 22.1, 22.1),
    "RTX 4060": (30.2, 15.1, 15.1),
    "RTX 3090 Ti": (80, 40, 40),
    "RTX 3090": (71, 35.6, 35.6),
    "RTX 3080 Ti": (68.2, 34.1, 34.1),
    "RTX 3080": (59.5, 29.8, 29.8),
    "RTX 3070": (40.6, 20.3, 20.3),
    "RTX 3060": (25.5, 12.7, 12.7),
    "V100": (125, 15.7, 15.7),
    "T4": (65, 8.1, 8.1),
    "MI325X": (1307, 653, 163),
    "MI300X": (1307, 653, 163),
    "MI300A": (981, 490, 122),
    "MI250X": (191.5, 47.9, 47.9),  # of one of its two dies: PyTorch sees two GPUs
}
LAPTOP = ("Laptop", "Max-Q", "Mobile")  # with the same names, other clocks: measured
SIZE = {"cuda": 8192, "cpu": 1024}  # of measured products
COLUMN = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 2}


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """Return the FLOP/s of a GPU's matrix products in `dtype` by its name, or None where the table has no such GPU.

    For fp32 it is the rate of TF32 where PyTorch may use that.
    """
    if any(word in name for word in LAPTOP):
        return None
    matching = (peaks for known, peaks in PEAKS.items() if f" {known} " in f" {re.sub('[-/]', ' ', name)} ")
    peaks = next(matching, None)
    if peaks is None:
        return None
    column = COLUMN[dtype]
    uses_tf32 = column == 2 and torch.get_float32_matmul_precision() != "highest"
    return peaks[1 if uses_tf32 else column] * TERA


def measured_peak_flops(dtype: torch.dtype, device: str, size: int | None = None, seconds: float = 0.2) -> float:
    """Return the FLOP/s of products of square matrices of this dtype, with `size` rows, on "cuda" or "cpu"."""
    size = size or SIZE[device]
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    while time.perf_counter() < end:
        synchronize()
        start = time.perf_counter()
        left @ right
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
