"""python run_ours.py CORPUS.jsonl TOKENIZER CACHE: our preparation, from the file to the open store."""

import sys
from pathlib import Path

from clock import tell


def main() -> None:
    import numpy as np
    from transformers import AutoTokenizer

    from sft_recipe.data.pipeline import open_store
    from sft_recipe.data.token_store import StoreOptions

    corpus, tokenizer_folder, cache = map(Path, sys.argv[1:])
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tell("begin")
    store = open_store([corpus], tokenizer, StoreOptions(max_length=2048), cache)
    tell("ready", examples=len(store), tokens=store.report.tokens, supervised=store.report.supervised)
    np.save(cache / "lengths.npy", store.lengths)


if __name__ == "__main__":  # workers import this file again
    main()
