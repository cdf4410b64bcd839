"""python run_verl.py CORPUS.parquet TOKENIZER CACHE WORKERS: every item of verl's own dataset once.

Its dataset tokenizes an item on access, so that "prepared" means: through its loader and its collator,
as each of its epochs does. It keeps nothing, and so has no use for the cache.
"""

import sys

from clock import tell
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

corpus, tokenizer_folder, _, workers = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
tell("begin")
settings = {"pad_mode": "no_padding", "max_length": 2048, "truncation": "right"}
dataset = MultiTurnSFTDataset([corpus], tokenizer, settings)
loader = DataLoader(dataset, batch_size=64, num_workers=int(workers), collate_fn=SFTTensorCollator("no_padding"))
examples = tokens = supervised = 0
for batch in loader:
    examples += batch["input_ids"].size(0)
    tokens += batch["input_ids"].values().numel()
    supervised += int(batch["loss_mask"].values().sum())
tell("ready", examples=examples, tokens=tokens, supervised=supervised)
