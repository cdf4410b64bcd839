"""MiniMind's models in the classes of transformers that compute the same: Qwen3, Qwen3-MoE, and Llama for early 2026.

The sizes are read from the tensors, whose names transformers has too. MiniMind ties head and embeddings.
"""

import difflib
import math
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from sft_recipe.errors import ModelError, first_line
from sft_recipe.files import digest
from sft_recipe.models.conversion import convert_once

PREFIX = "minimind:"
VOCABULARY, BOS, EOS = 6400, 1, 2
ROPE_THETA, POSITIONS = 1e6, 32768
HEADS_WITHOUT_NORM, EPS_WITHOUT_NORM = 8, 1e-5  # of the version of early 2026, whose tensors do not show them
AUX_LOSS_COEF = 5e-4
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERIES = "model.layers.0.self_attn.q_proj.weight"
# What the name of a model with random weights can set, with MiniMind's defaults; intermediate_size follows hidden_size.
SIZES = {
    "hidden_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 0,
    "vocab_size": VOCABULARY,
    "use_moe": 0,
    "num_experts": 4,
}
COMPARED = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "num_experts_per_tok",
    "norm_topk_prob",
)
BUFFERS = re.compile(r"model\.freqs_\w+")  # computed, not trained

Weights = dict[str, torch.Tensor]


def from_state_dict(weights: Weights, source: str) -> tuple[PretrainedConfig, Weights]:
    """Return the configuration that fits MiniMind's weights, and the weights that it has places for.

    Raises ModelError, beginning with `source`, for weights of another model.
    """
    weights = {name: tensor for name, tensor in weights.items() if not BUFFERS.fullmatch(name)}
    if EMBEDDINGS not in weights or QUERIES not in weights:
        raise ModelError(
            f"{source} is not a model of MiniMind, and there is no config.json beside it that says what model it is: "
            "put the config.json of its model into that folder"
        )
    if any("shared_experts" in name for name in weights):
        raise ModelError(f"{source}: MiniMind's older mixture of experts has shared experts, which are not supported")
    is_tied = HEAD not in weights or torch.equal(weights[HEAD], weights[EMBEDDINGS])
    if is_tied:
        weights.pop(HEAD, None)
    try:
        sizes = _sizes(weights, source)
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{source} has not all weights of a model of MiniMind: {first_line(error)}") from None
    return _config(sizes | {"tie_word_embeddings": is_tied}), weights


def require_same_model(weights: Weights, config: PretrainedConfig, source: str) -> None:
    """Raise ModelError where MiniMind would read `weights` as another model than the one that `config` describes."""
    try:
        expected, _ = from_state_dict(weights, source)
    except ModelError:
        problem = f"{source} is no model of MiniMind, but a {config.model_type}"
        raise ModelError(f"{problem}: --format pth is for MiniMind's architecture, --format hf for all") from None
    for key in ("model_type", *COMPARED):
        found, wanted = getattr(config, key, None), getattr(expected, key, None)
        if found != wanted:
            raise ModelError(f"{source} is no model of MiniMind, where {key} is {wanted} and not {found}; --format hf")


def _sizes(weights: Weights, source: str) -> dict[str, Any]:
    layer = "model.layers.0."
    vocabulary, hidden = weights[EMBEDDINGS].shape
    queries, keys = (weights[f"{layer}self_attn.{name}_proj.weight"].shape[0] for name in "qk")
    norm = weights.get(f"{layer}self_attn.q_norm.weight")
    if norm is None and vocabulary != VOCABULARY:
        raise ModelError(
            f"{source}: the number of attention heads cannot be read from these weights; put the config.json of the "
            "model into that folder"
        )
    head_dim = queries // HEADS_WITHOUT_NORM if norm is None else norm.shape[0]
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")),
        "num_attention_heads": queries // head_dim,
        "num_key_value_heads": keys // head_dim,
        "head_dim": head_dim,
        "has_query_norm": norm is not None,
    }
    if (router := weights.get(f"{layer}mlp.gate.weight")) is None:
        return sizes | {"intermediate_size": weights[f"{layer}mlp.gate_proj.weight"].shape[0]}
    inner = weights[f"{layer}mlp.experts.0.gate_proj.weight"].shape[0]
    return sizes | {"intermediate_size": inner, "num_experts": router.shape[0]}


def random_model(name: str, cache_dir: Path) -> Path:
    """Return the folder of a model with random weights; `name` has its sizes: `minimind:hidden_size=512,use_moe=1`.

    The same name always gives the same weights. Raises ModelError for a name that cannot be read, and for sizes that
    do not fit each other.
    """
    sizes = _named_sizes(name)
    spec = ",".join(f"{key}={value}" for key, value in sorted(sizes.items()))
    key = digest(spec.encode())
    return convert_once("minimind", key, cache_dir, lambda folder: _write_random(_config(sizes), name, folder))


def _named_sizes(name: str) -> dict[str, Any]:
    given: dict[str, int] = {}
    for part in filter(None, name.removeprefix(PREFIX).split(",")):
        key, _, value = (text.strip() for text in part.partition("="))
        if key not in SIZES:
            near = difflib.get_close_matches(key, SIZES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SIZES)}"
            raise ModelError(f"{name}: MiniMind has no size {key!r}; {hint}")
        if not re.fullmatch(r"\d{1,9}", value) or (int(value) == 0 and key != "use_moe"):
            raise ModelError(f"{name}: {key} is {value!r}; expected a whole number, 1 or more")
        given[key] = int(value)
    sizes: dict[str, Any] = SIZES | given
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if hidden % (2 * heads) or heads % sizes["num_key_value_heads"]:
        raise ModelError(
            f"{name}: hidden_size must be an even multiple of num_attention_heads={heads}, and that a multiple of "
            f"num_key_value_heads={sizes['num_key_value_heads']}"
        )
    sizes["intermediate_size"] = given.get("intermediate_size", 64 * math.ceil(hidden * math.pi / 64))
    if not sizes.pop("use_moe"):
        del sizes["num_experts"]
    return sizes | {"head_dim": hidden // heads, "has_query_norm": True, "tie_word_embeddings": True}


def _write_random(config: PretrainedConfig, name: str, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = AutoModelForCausalLM.from_config(config)
        except (RuntimeError, MemoryError) as error:
            raise ModelError(f"{name} cannot be built: {first_line(error)}") from None
        model.save_pretrained(folder)


def _config(sizes: dict[str, Any]) -> PretrainedConfig:
    sizes = dict(sizes)
    has_query_norm = sizes.pop("has_query_norm")
    common: dict[str, Any] = {
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-6 if has_query_norm else EPS_WITHOUT_NORM,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": None,  # else transformers would not train the embedding of token 0
    }
    if "num_experts" in sizes:
        experts: dict[str, Any] = {
            "num_experts_per_tok": 1,
            "norm_topk_prob": True,
            "router_aux_loss_coef": AUX_LOSS_COEF,
        }
        inner = {"moe_intermediate_size": sizes["intermediate_size"]}
        return Qwen3MoeConfig(architectures=["Qwen3MoeForCausalLM"], **common, **sizes, **experts, **inner)
    if has_query_norm:
        return Qwen3Config(architectures=["Qwen3ForCausalLM"], **common, **sizes)
    return LlamaConfig(architectures=["LlamaForCausalLM"], **common, **sizes)
