"""Sizes of memory and files on command lines, such as 24GB or 500MiB."""

import argparse
import re

UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}


def size(text: str) -> int:
    """Return the bytes that a text such as 5GB, 500MiB or 24G means; G and GiB are 2**30 bytes, GB is 10**9.

    Raises ArgumentTypeError, as argparse wants it of types.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(I?B)?", text.strip().upper())
    count = int(float(match[1]) * (1000 if match[3] == "B" else 1024) ** UNITS[match[2]]) if match else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a size such as 24GB, 500MB or 2GiB")
    return count
