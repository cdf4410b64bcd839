"""Sizes of encoder-decoder models: operations against PyTorch's counter, bytes against what autograd saves."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSeq2SeqLM

from sft_recipe.config.compose import load_config
from sft_recipe.models.seq2seq_sizes import Seq2SeqDims, Seq2SeqMatmulParams
from tests.support import seq2seq

ROWS, SOURCE, TARGET = 3, 40, 24
KINDS = [("t5", "eager"), ("bart", "eager"), ("bart", "sdpa"), ("t5gemma2", "eager"), ("t5gemma2", "sdpa")]
DATA = load_config([f"data.max_length={SOURCE}", f"data.max_target_length={TARGET}"]).data


def model_of(folder, kind, attention):
    seq2seq.build_model(folder, kind, **({"num_decoder_layers": 3} if kind == "t5" else {}))
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)


def inputs():
    return dict(
        input_ids=torch.full((ROWS, SOURCE), 5), decoder_input_ids=torch.full((ROWS, TARGET), 6), use_cache=False
    )


@pytest.mark.parametrize("kind", ["t5", "bart", "t5gemma2"])
def test_operations_of_a_forward_pass_equal_those_that_pytorch_counts(kind, tmp_path):
    model = model_of(tmp_path, kind, "eager")
    with FlopCounterMode(display=False) as counter:
        model(**inputs())
    params = Seq2SeqMatmulParams.of_model(model)
    # Eager attention computes all pairs of target tokens; step_flops counts those that are not masked.
    weights = 2 * ROWS * (params.source * SOURCE + (params.target + params.head) * TARGET)
    pairs = params.encoder_attention * SOURCE**2 + params.decoder_attention * (TARGET**2 + TARGET * SOURCE)
    assert counter.get_total_flops() == pytest.approx(weights + 4 * ROWS * pairs, rel=2e-3)  # rotary angles are extra
    lengths, targets = np.full(ROWS, SOURCE + TARGET), np.full(ROWS, TARGET)
    masked = params.decoder_attention * TARGET * (TARGET - 1) // 2
    assert params.step_flops(lengths, targets) == 3 * (weights + 4 * ROWS * (pairs - masked))


def test_adapters_are_counted_on_the_side_of_their_tokens(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = model_of(tmp_path, "t5", "eager")
    before = Seq2SeqMatmulParams.of_model(model)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q", "k"]))
    params = Seq2SeqMatmulParams.of_model(model)
    assert (params.source, params.target) == (before.source, before.target)
    adapter = 4 * (32 + 32)  # rank x (inputs + outputs)
    # q and k of 2 encoder layers and k of 3 cross-attentions; q and k of 3 self-attentions and q of 3 cross-attentions
    assert (params.adapted_source, params.adapted_target) == (7 * adapter, 9 * adapter)


@pytest.mark.parametrize("kind, attention", KINDS)
def test_estimated_activations_are_those_that_autograd_saves(kind, attention, tmp_path):
    model = model_of(tmp_path, kind, attention)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs()).logits.float().log_softmax(-1).sum()
    dims = Seq2SeqDims.of_model(model.config, DATA, attention)
    tokens = ROWS * (SOURCE + TARGET)
    estimated = tokens * dims.activation_bytes_per_token(4, on_cpu=False, is_unsharded=False) * dims.layers
    estimated += dims.head_bytes(tokens, 4, on_cpu=False, logits=0)
    assert loss.requires_grad and 0.9 < estimated / sum(saved.values()) < 2.5
