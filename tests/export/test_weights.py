"""Weights are read one at a time and computed with in fp32 one layer at a time: memory does not hold the model."""

import weakref

import torch
from transformers import AutoModelForCausalLM

from sft_recipe.export.verification import computed_in_fp32
from sft_recipe.export.weights import Entry, write_weights


class CountedWeights:
    """Weights of 1000 bytes each; `most` is the largest number that were alive at the same time."""

    def __init__(self, count: int):
        self.entries = {f"layer.{number}": Entry((250,), torch.float32) for number in range(count)}
        self.alive = self.most = 0

    def read(self, name: str) -> torch.Tensor:
        value = torch.full((250,), float(name.split(".")[1]))
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(value, self.release)
        return value

    def release(self) -> None:
        self.alive -= 1


def test_memory_holds_one_shard(tmp_path):
    weights = CountedWeights(50)
    write_weights(weights, tmp_path, torch.float32, 4000, lambda count: None)
    assert len(list(tmp_path.glob("*.safetensors"))) == 13
    assert weights.most <= 4 + 1 and weights.alive <= 1


def test_layers_compute_in_fp32(model_dir):
    ids = torch.arange(3, 60)[None]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    weights = {name: value.data_ptr() for name, value in model.named_parameters()}
    with computed_in_fp32(model):
        found = model(ids).logits
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == weights
    assert model.dtype == torch.bfloat16 and not model.model.layers[0].mlp.up_proj._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(found, model.float()(ids).logits)
