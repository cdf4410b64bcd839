"""Sizes on command lines: --shard_size and --gpu_memory."""

import argparse

import pytest

from sft_recipe.cli.sizes import size


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("200kb", 200_000), ("24G", 24 * 2**30), ("1TiB", 2**40)],
)
def test_sizes(text, expected):
    assert size(text) == expected


@pytest.mark.parametrize("text", ["5", "GB", "-1GB", "0GB", "5 GBit", "5B"])
def test_other_sizes_are_errors(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as 24GB"):
        size(text)
