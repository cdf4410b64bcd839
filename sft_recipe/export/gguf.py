"""Writes a model as a GGUF file, which llama.cpp and Ollama load: one weight in memory at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from sft_recipe.errors import ModelError
from sft_recipe.export.gguf_tokenizer import add_tokenizer
from sft_recipe.export.weights import Weights
from sft_recipe.models.families import family_of
from sft_recipe.models.loading import check_weights

QUANTS = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
NOT_WEIGHTS = (".rotary_emb.inv_freq", ".attention.bias", ".masked_bias")  # of old files: constants


def write_gguf(
    weights: Weights,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: list[int],
    path: Path,
    quant: str,
    advance: Callable[[int], None],
) -> None:
    """Write the file `path`; matrices are stored in `quant`, vectors in fp32.

    `end_ids` are the tokens that end an answer, that of the chat template last. `advance` is called with the number of
    weights done since. Raises ModelError for a model or tokenizer that a GGUF file cannot describe here, and OSError.
    """
    check_architecture(config)
    writer = gguf.GGUFWriter(path, config.model_type)
    _add_settings(writer, config, path.stem, quant)
    add_tokenizer(writer, tokenizer, config.vocab_size, end_ids)
    names = _names(weights, config)
    for ours, theirs in names.items():
        _add_info(writer, theirs, weights.entries[ours].shape, quant)
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for ours in names:
        writer.write_tensor_data(_encoded(_arranged(weights.read(ours).float(), ours, config), quant, ours))
        advance(1)
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()


def check_architecture(config: PretrainedConfig) -> None:
    """Raise ModelError for a model that this module cannot write."""
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"--format gguf is for Llama (SmolLM among them), Qwen2 and Qwen3; this model is a {config.model_type}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    unsupported = {
        f"rotary embeddings of the type {rope.get('rope_type')}": rope.get("rope_type", "default")
        not in ("default", "llama3"),
        "sliding windows": getattr(config, "use_sliding_window", False),
        "biases in its attention": config.model_type != "qwen2" and getattr(config, "attention_bias", False),
        "biases in its MLP": getattr(config, "mlp_bias", False),
        f"the activation {config.hidden_act}": config.hidden_act != "silu",
    }
    if found := [name for name, is_so in unsupported.items() if is_so]:
        raise ModelError(f"--format gguf: the model has {', '.join(found)}, which is not supported; use --format hf")


def load_gguf(path: Path, config: PretrainedConfig) -> Any:
    """Return the model of a GGUF file in fp32, as transformers reads it.

    `config` gives what transformers does not read from such files: the size of heads (Qwen3), and how rotary
    embeddings are scaled. Raises ModelError.
    """
    location: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    found = AutoConfig.from_pretrained(**location)
    found.head_dim = _head_dim(config)
    if _is_llama3(config):
        found.rope_parameters = config.rope_parameters
    loaded: Any = family_of(config).auto.from_pretrained(
        **location, config=found, dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    check_weights(path, report)
    return model.eval()


def _add_settings(writer: gguf.GGUFWriter, config: PretrainedConfig, name: str, quant: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "llama":
        writer.add_rope_dimension_count(_head_dim(config))


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _is_llama3(config: PretrainedConfig) -> bool:
    return config.rope_parameters.get("rope_type") == "llama3"


def _names(weights: Weights, config: PretrainedConfig) -> dict[str, str]:
    """Maps the names of the weights to those in the file; a head that is the embeddings is not stored."""
    known = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    names = {}
    for name in weights.entries:
        if name.endswith(NOT_WEIGHTS) or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if (found := known.get_name(name, try_suffixes=(".weight", ".bias"))) is None:
            raise ModelError(f"--format gguf: the format has no place for the weight {name}")
        names[name] = found
    return names


def _add_info(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], quant: str) -> None:
    kind = _kind(shape, quant)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = (*shape[:-1], shape[-1] // block * size)
    dtype = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}.get(kind, np.uint8)
    if dtype is np.uint8:
        writer.add_tensor_info(name, stored, np.dtype(dtype), int(np.prod(stored)), raw_dtype=kind)
    else:
        writer.add_tensor_info(name, shape, np.dtype(dtype), int(np.prod(stored)))


def _kind(shape: tuple[int, ...], quant: str) -> gguf.GGMLQuantizationType:
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    kind = QUANTS[quant]
    return kind if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else gguf.GGMLQuantizationType.F16


def _arranged(weight: torch.Tensor, name: str, config: PretrainedConfig) -> np.ndarray:
    """Return the weight with the rows of a Llama's queries and keys in llama.cpp's order.

    There the two halves of a head that rotary embeddings rotate together alternate: rows 0 1 2 3 become 0 2 1 3.
    """
    array = weight.numpy()
    if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = array.shape[0] // _head_dim(config)
        array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
    return np.ascontiguousarray(array)


def _encoded(array: np.ndarray, quant: str, name: str) -> np.ndarray:
    kind = _kind(array.shape, quant)
    if kind == gguf.GGMLQuantizationType.F16 and float(np.abs(array).max()) > np.finfo(np.float16).max:
        raise ModelError(f"{name} has values beyond 65504, the largest of float16; use --format hf")
    return quantize(array, kind)


def _rope_factors(config: PretrainedConfig) -> np.ndarray | None:
    """Return how much each frequency is divided by, for rotary embeddings of the type llama3."""
    if not _is_llama3(config):
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = _head_dim(config)
    plain = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
    return (plain / scaled).float().numpy()
