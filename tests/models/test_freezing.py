"""Which weights model.freeze and model.train_only select, by parts and by names, in tied and untied models."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from sft_recipe.errors import ConfigError
from sft_recipe.models.freezing import describe_trained, freeze_weights

LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32  # q and o, k and v of half as many heads, MLP, norms
TABLE, NORM = 512 * 32, 32


def llama(tied=False):
    sizes = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=4)
    with torch.device("meta"):
        heads = dict(num_attention_heads=4, num_key_value_heads=2)
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))


def t5():
    sizes = dict(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    with torch.device("meta"):
        return T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=True))


def trained(model):
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize(
    ("tied", "freeze", "train_only", "expected"),
    [
        (False, ["embeddings"], [], 4 * LAYER + NORM + TABLE),
        (False, ["head"], [], 4 * LAYER + NORM + TABLE),
        (False, ["decoder"], [], 2 * TABLE),
        (False, ["embeddings", "head"], [], 4 * LAYER + NORM),
        (True, ["embeddings"], [], 4 * LAYER + NORM),
        (True, ["head"], [], 4 * LAYER + NORM),  # it is the table of the embeddings
        (True, ["decoder"], [], TABLE),
        (False, [], ["head"], TABLE),
        (False, [], ["decoder"], 4 * LAYER + NORM),
        (False, [r"layers.[0-1]."], ["decoder"], 2 * LAYER + NORM),
        (False, [], [r"layers\.3\.", r"model\.norm\."], LAYER + NORM),
        (False, [], ["q_proj"], 4 * 32 * 32),
        (False, ["norm"], ["layers.0.input"], None),
    ],
)
def test_parts_and_expressions_select_weights(tied, freeze, train_only, expected):
    model = llama(tied)
    if expected is None:
        with pytest.raises(ConfigError, match="leave no weight to train"):
            freeze_weights(model, freeze, train_only)
        return
    freeze_weights(model, freeze, train_only)
    assert trained(model) == expected


def test_parts_of_an_encoder_decoder_model_do_not_overlap():
    """T5 shares one table between encoder, decoder and head; each stack has positions inside of its first layer."""
    total = trained(t5())
    attention, norm, positions = 4 * 32 * 32, 32, 32 * 4
    sizes = {
        "encoder": 2 * (attention + 2 * 32 * 64 + 2 * norm) + norm + positions,
        "decoder": 2 * (2 * attention + 2 * 32 * 64 + 3 * norm) + norm + positions,
        "embeddings": 384 * 32,
        "head": 384 * 32,
    }
    assert total == sizes["encoder"] + sizes["decoder"] + sizes["embeddings"]
    for part, size in sizes.items():
        model = t5()
        freeze_weights(model, [part], [])
        assert trained(model) == total - size
    model = t5()
    freeze_weights(model, ["encoder", "embeddings"], [])
    assert trained(model) == sizes["decoder"]
    assert describe_trained(model) == "decoder.block.0-1, decoder.final_layer_norm.weight"


def test_learned_positions_are_embeddings():
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4))
        bart = BartForConditionalGeneration(BartConfig(encoder_layers=1, decoder_layers=1))
    freeze_weights(gpt2, [], ["embeddings"])
    assert describe_trained(gpt2) == "transformer.wte.weight, transformer.wpe.weight"
    freeze_weights(bart, [], ["embeddings"])
    assert len([weight for weight in bart.parameters() if weight.requires_grad]) == 3


@pytest.mark.parametrize(
    ("freeze", "expected"),
    [
        ([r"layers.[0-1]."], "model.embed_tokens.weight, model.layers.2-3, model.norm.weight, lm_head.weight"),
        (["layers.1.", "embed", "head", "model.norm"], "model.layers.0+2-3"),
        (["proj", "norm.weight$", "embed"], "lm_head.weight"),
        (["proj", "embed", "head", "input"], "model.layers.0-3.post_attention_layernorm.weight, model.norm.weight"),
    ],
)
def test_description_names_layers_once(freeze, expected):
    model = llama()
    freeze_weights(model, freeze, [])
    assert describe_trained(model) == expected


@pytest.mark.parametrize(
    ("tied", "entry", "expected"),
    [
        (False, "encoder", "the model has no encoder; it has decoder, embeddings, head"),
        (False, "embedings", "is found in the name of no parameter (they look like model.layers.0."),
        (False, "embedings", "Did you mean embeddings?"),
        (False, "layers.7", "is found in the name of no parameter"),
        (True, "lm_head", "lm_head.weight is the same weight as model.embed_tokens.weight"),
    ],
)
@pytest.mark.parametrize("key", ["freeze", "train_only"])
def test_an_entry_that_selects_nothing_is_one_message(key, tied, entry, expected):
    with pytest.raises(ConfigError) as caught:
        freeze_weights(llama(tied), **{"freeze": [], "train_only": [], key: ["norm", entry]})
    assert str(caught.value).startswith(f"model.{key}: ") and expected in str(caught.value)
