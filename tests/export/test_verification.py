"""The bound of an export separates merges that bfloat16 rounds from wrong ones, whatever the adapters' scale."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sft_recipe.errors import ModelError
from sft_recipe.export.verification import make_reference, verify_export
from tests.support import tiny

WRONG = {
    "twice the scale": {"factor": 2.0},
    "half the scale": {"factor": 0.5},
    "a layer is missing": {"without": "layers.1."},
    "transposed": {"transposed": True},
    "not merged": {"factor": 0.0},
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def base(request, tmp_path_factory):
    """A model whose weights are stored in fp32, or in bf16, so that only merged ones are rounded."""
    folder = tiny.build_model(tmp_path_factory.mktemp("verified") / "model")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, request.param)).float().eval()


def adapted(base, alpha):
    torch.manual_seed(0)
    targets = ["q_proj", "o_proj", "down_proj"]
    settings = LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    return get_peft_model(copy.deepcopy(base), settings).eval()


def merged(base, adapted, factor=1.0, without=None, transposed=False):
    """The base with W + B A alpha / r in double precision, stored in bfloat16; wrong where an argument says so."""
    model = copy.deepcopy(base)
    for name, module in adapted.get_base_model().named_modules():
        if not hasattr(module, "lora_A") or (without and without in name):
            continue
        a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
        change = factor * module.scaling["default"] * b @ a
        if transposed and change.shape[0] == change.shape[1]:
            change = change.T
        weight = model.get_submodule(name).weight
        weight.data = (weight.double() + change).float()
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("alpha", [0.5, 4, 64])
def test_a_merge_that_is_only_rounded_passes_with_a_margin(base, tokenizer, alpha):
    trained = adapted(base, alpha)
    reference = make_reference(trained.get_base_model(), tokenizer)
    found = verify_export(merged(base, trained), reference, "bfloat16")
    assert 0 < found.relative_difference < found.bound / 1.5 and not found.is_rounding


@pytest.fixture
def nudged(base):
    """The base in bfloat16, and the same with each weight larger by 0.49 of its step, which bfloat16 cannot hold."""
    stored, model = copy.deepcopy(base), copy.deepcopy(base)
    for weight, changed in zip(stored.parameters(), model.parameters(), strict=True):
        weight.data = weight.data.bfloat16()
        larger = weight.data.float() + 2.0 ** (torch.frexp(weight.data.float()).exponent - 8) * 0.49
        changed.data = torch.where(larger.bfloat16() == weight.data, larger, weight.data.float())
    return model, stored


def test_rounding_that_undoes_small_changes_alike_passes(nudged, tokenizer):
    trained, stored = nudged
    reference = make_reference(trained, tokenizer)
    with pytest.raises(ModelError, match="--dtype float32 passes"):
        verify_export(copy.deepcopy(stored), reference, "bfloat16")
    found = verify_export(copy.deepcopy(stored), reference, "bfloat16", trained)
    assert found.is_rounding and found.relative_difference > found.bound
    assert "above it by rounding alone" in str(found)


@pytest.mark.parametrize("place", ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"])
def test_another_model_than_the_rounded_one_is_refused(nudged, tokenizer, place):
    trained, stored = nudged
    weight = stored.get_submodule(place).weight
    weight.data[:4] *= 3
    with pytest.raises(ModelError, match="--dtype float32 passes"):
        verify_export(stored, make_reference(trained, tokenizer), "bfloat16", trained)


@pytest.mark.parametrize("alpha", [0.5, 64])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_merge_is_refused_with_a_margin(base, tokenizer, alpha, wrong):
    trained = adapted(base, alpha)
    reference = make_reference(trained.get_base_model(), tokenizer)
    with pytest.raises(ModelError, match="If this is the rounding to bfloat16, --dtype float32 passes") as caught:
        verify_export(merged(base, trained, **WRONG[wrong]), reference, "bfloat16")
    difference, bound = (float(text) for text in re.findall(r"([\d.e+-]+)%", str(caught.value)))
    assert difference > 2 * bound
