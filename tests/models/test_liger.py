"""Liger's kernels, with a stub for the package, which needs a GPU: what it is asked for, and what is refused."""

import sys
from types import ModuleType

import pytest
from transformers import AutoConfig

from sft_recipe.config import preflight
from sft_recipe.config.compose import load_config
from sft_recipe.errors import ConfigError, ModelError, PreflightError
from sft_recipe.models import liger
from sft_recipe.models.families import fit
from sft_recipe.models.loading import build_model

LLAMA = AutoConfig.for_model(
    "llama", vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)


@pytest.fixture
def calls(monkeypatch):
    """Install a package that knows Llama and cannot change Gemma; returns what it was called with."""
    made = []

    def change_llama(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, model=None):
        made.append((model, rope, rms_norm, cross_entropy, fused_linear_cross_entropy))

    def change_gemma(cross_entropy=False, fused_linear_cross_entropy=True, model=None):
        raise TypeError("Unsupported Gemma model type.")

    names = ["liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": change_llama, "gemma": change_gemma}
    monkeypatch.setattr(liger, "version", lambda name: "0.8.5")
    return made


def test_head_and_loss_stay_and_all_else_is_replaced(calls):
    model = build_model(LLAMA)
    liger.apply_liger(model)
    assert calls == [(model, True, True, False, False)]


def test_a_model_without_kernels_is_refused_with_those_that_have(calls):
    fit(load_config(["model.use_liger=true"]), LLAMA)
    with pytest.raises(ModelError, match="0.8.5 has no kernels for bloom models, only for gemma, llama; set it to"):
        fit(load_config(["model.use_liger=true"]), AutoConfig.for_model("bloom"))


def test_a_model_that_liger_cannot_change_is_one_message(calls):
    sizes = dict(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = build_model(AutoConfig.for_model("gemma", **sizes, num_key_value_heads=2, head_dim=4))
    with pytest.raises(ModelError, match="cannot change this GemmaForCausalLM: .*Unsupported Gemma model type"):
        liger.apply_liger(model)


def test_encoder_decoders_are_refused(calls):
    with pytest.raises(ConfigError, match="model.use_liger=true does not apply to encoder-decoder models"):
        fit(load_config(["model.use_liger=true"]), AutoConfig.for_model("t5"))


def test_without_a_gpu_or_the_package_it_is_refused(monkeypatch):
    config = load_config(["model.use_liger=true"])
    with pytest.raises(PreflightError, match="Liger's kernels run on GPUs, and there is none"):
        preflight.check(config, "cpu")
    monkeypatch.setattr(preflight, "check_config", lambda *_: None)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setattr(preflight, "is_installed", lambda name: False)
    with pytest.raises(PreflightError, match=r"pip install -e '.\[liger\]'"):
        preflight.check(config, "cuda")
    with pytest.raises(PreflightError, match="liger-kernel cannot be imported"):
        fit(config, LLAMA)


@pytest.mark.parametrize(
    ("setting", "message"),
    [("fsdp.use_torch_compile=true", "set only one"), ("fsdp.strategy=megatron", "model.use_liger needs FSDP")],
)
def test_what_it_clashes_with_is_an_error(setting, message):
    with pytest.raises(ConfigError, match=message):
        load_config(["model.use_liger=true", setting])
