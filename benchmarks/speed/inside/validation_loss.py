"""python validation_loss.py MODEL BASE RECORDS.jsonl MAX_LENGTH: the mean loss of a model, or adapter, in plain fp32.

Over the tokens of the answers and the <|im_end|> that ends them; one row at a time, so that there is neither padding
nor packing. Weights that do not fit the model are an error: transformers would fill the gaps at random.
"""

import json
import sys
from pathlib import Path

import torch
from chatml import encode
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

folder, base, records, max_length = sys.argv[1:]


def load(path):
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    if wrong := {what: sorted(names)[:3] for what, names in info.items() if what.endswith("_keys") and names}:
        sys.exit(f"the weights do not fit the model: {wrong}")
    return model


def merged(about):
    """verl's export of a LoRA run: the whole model under peft's names."""
    weights = {name: part for path in Path(folder).glob("*.safetensors") for name, part in load_file(path).items()}
    plain = {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        down = name.replace(".base_layer.weight", ".lora_A.default.weight")
        weight = weight.float()
        if down != name:
            up = weights[down.replace("lora_A", "lora_B")].float()
            weight = weight + about["lora_alpha"] / about["r"] * up @ weights[down].float()
        plain[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = weight
    model = load(base)
    missing, unexpected = model.load_state_dict(plain, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        sys.exit(f"the weights do not fit the model: {missing[:3]}, {unexpected[:3]}")
    model.tie_weights()
    return model


def load_model():
    about = Path(folder, "lora_train_meta.json")
    if about.is_file():
        return merged(json.loads(about.read_text()))
    if Path(folder, "adapter_config.json").is_file():
        from peft import PeftModel

        return PeftModel.from_pretrained(load(base), folder).merge_and_unload()
    return load(folder)


model, tokenizer = load_model().eval(), Tokenizer.from_file(f"{base}/tokenizer.json")
loss = tokens = 0
with torch.no_grad(), open(records) as file:
    for line in file:
        prompt, answer = encode(tokenizer, json.loads(line)["messages"])
        ids = torch.tensor([(prompt + answer)[: int(max_length)]])
        targets = ids[0, len(prompt) :]
        if not len(targets):
            continue
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        loss += torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()
        tokens += len(targets)
print(json.dumps({"loss": loss / tokens, "tokens": tokens}))
