"""Names in lora.target_modules and lora.exclude_modules that the model does not have are errors, as peft reads them."""

import pytest
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import LlamaForCausalLM

from sft_recipe.config.compose import load_config
from sft_recipe.errors import ConfigError
from sft_recipe.models.adapters import check_modules, unknown_modules
from tests.support import tiny
from tests.support.small_run import arguments


@pytest.fixture(scope="module")
def names(model_dir):
    return [name for name, _ in LlamaForCausalLM.from_pretrained(model_dir).named_modules()]


@pytest.mark.parametrize(
    "pattern",
    [
        ["q_proj"],
        ["self_attn.q_proj"],
        ["model.layers.1.mlp.up_proj"],
        ["proj"],
        ["layers.2.self_attn.q_proj"],
        "q_proj",
        r".*\.q_proj",
        r".*(q|v)_proj",
        "model",
    ],
)
def test_a_pattern_is_known_where_peft_finds_a_module(names, pattern):
    config = PeftLoraConfig(target_modules=pattern)
    found = any(check_target_module_exists(config, name) for name in names)
    assert (unknown_modules(pattern, names) == []) == found


@pytest.mark.parametrize(
    ("override", "expected_texts"),
    [
        (
            "target_modules=[q_proj,v_porj]",
            ["lora.target_modules: the model has no module v_porj. Did you mean v_proj?", "down_proj", "up_proj"],
        ),
        ("target_modules=[q_proj,v_porj,o_porj]", ["v_porj, o_porj. Did you mean v_proj? Did you mean o_proj?"]),
        ("exclude_modules=[k_pro]", ["lora.exclude_modules: the model has no module k_pro. Did you mean k_proj?"]),
        (
            "target_modules=q_proj",
            ["'q_proj' is a regular expression", "such as model.layers.0.self_attn.q_proj,", "like this: [q_proj]."],
        ),
        ("target_modules='q_proj, v_porj'", ["like this: [q_proj, v_porj]. Did you mean v_proj?"]),
        ("target_modules=all_linear", ["Did you mean all-linear?"]),
        ("exclude_modules=lm_hed", ["lora.exclude_modules: 'lm_hed' is a regular expression", "lm_head?"]),
    ],
)
def test_unknown_module_is_an_error_with_the_nearest_name(names, override, expected_texts):
    with pytest.raises(ConfigError) as caught:
        check_modules(load_config([f"lora.{override}"]).lora, names)
    assert [text for text in expected_texts if text not in str(caught.value)] == []


@pytest.mark.parametrize(
    "override",
    [
        "target_modules=all-linear",
        "target_modules=All-Linear",
        "target_modules=[q_proj,mlp.up_proj]",
        r"target_modules='.*\.(q|v)_proj'",
        "exclude_modules=[lm_head]",
        "exclude_modules=[]",
    ],
)
def test_known_modules_are_accepted(names, override):
    check_modules(load_config([f"lora.{override}"]).lora, names)


@pytest.mark.parametrize(
    ("override", "expected_text"),
    [
        (
            "target_modules='*_proj'",
            "lora.target_modules is '*_proj'; it is not a regular expression: nothing to repeat",
        ),
        ("exclude_modules='('", "lora.exclude_modules is '('; it is not a regular expression"),
        ("target_modules=[]", "lora.target_modules is []; it must name modules"),
        ("target_modules=''", "lora.target_modules is ''; it must name modules"),
    ],
)
def test_pattern_that_can_match_nothing_is_a_configuration_error(override, expected_text):
    with pytest.raises(ConfigError) as caught:
        load_config([f"lora.{override}"])
    assert expected_text in str(caught.value)


@pytest.mark.parametrize(("is_tied", "code"), [(True, 0), (False, 2)])
def test_adapters_of_untied_embeddings_are_refused_with_fsdp2(warm, tmp_path, is_tied, code):
    folder = tiny.build_model(tmp_path / "model", tie_word_embeddings=is_tied)
    adapters = ["lora.enabled=true", "lora.target_modules=[embed_tokens,q_proj]", "trainer.total_training_steps=1"]
    end = warm.run(arguments(folder, tmp_path / "run", "fsdp.strategy=fsdp2", *adapters), ranks=2)
    assert end.code == code, end.output
    assert ("leave them out of lora.target_modules" in end.output) is not is_tied
