"""The loss of a model by transformers alone: no packing, no patch, eager attention."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer


def plain_loss(folder: Path, records: Sequence[dict[str, str]]) -> float:
    """Return the mean over the tokens of all responses and their end tokens, of a folder with the ChatML tokenizer.

    One unpadded conversation at a time, in fp32 and without dropout.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    total, count = 0.0, 0
    for record in records:
        prompt = f"<|im_start|>user\n{record['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = tokenizer(f"{prompt}{record['response']}<|im_end|>\n", add_special_tokens=False)["input_ids"]
        end = len(ids) - len(tokenizer("\n", add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        targets = torch.tensor(ids[len(head) : end])
        total += float(F.cross_entropy(logits[len(head) - 1 : end - 1].double(), targets, reduction="sum"))
        count += len(targets)
    return total / count
