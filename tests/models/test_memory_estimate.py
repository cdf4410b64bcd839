"""The memory plan: its arithmetic by hand, what autograd really keeps, and the choice that follows."""

import pytest
import torch

from sft_recipe.config.auto import PACKED_ATTENTION
from sft_recipe.config.compose import load_config
from sft_recipe.engine.cpu.platform import use_cpu
from sft_recipe.models.memory_estimate import (
    ModelDims,
    estimate_memory,
)
from sft_recipe.models.workload import Workload

SMALL = ModelDims(layers=2, hidden=8, intermediate=16, vocabulary=32, heads=2, query=8, key=4)
DEEP = ModelDims(layers=20, hidden=8, intermediate=16, vocabulary=32, heads=2, query=8, key=4)
WIDE = ModelDims(layers=20, hidden=8, intermediate=16, vocabulary=320, heads=2, query=8, key=4)
SMOLLM2 = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3,
)  # fmt: skip
LLAMA = dict(
    model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8,
)  # fmt: skip


def small_plan(
    *overrides,
    dims=SMALL,
    total=1000,
    trainable=1000,
    width=2,
    on_cpu=False,
    longest=100,
    logits=10**6,
    device=10**6,
):
    config = load_config(["data.max_length=10", "data.train_batch_size=4", *overrides])
    return estimate_memory(config, dims, total, trainable, width, on_cpu, Workload(longest, longest), logits, device)


def test_a_layers_bytes_for_each_token():
    norms = 2 * 8 * (4 + 2) + 2 * 8 * 2  # inputs in fp32, what is multiplied with the weights; outputs
    attention = 2 * (8 + 4 + 4 + 8)  # q, k, v, out
    mlp = 2 * 2 * 16  # gate, up
    on_gpu = norms + attention + 2 * 8 + 4 * 2 + mlp + 2 * 2 * 16  # out packed, log-sum-exps; product, activation
    assert SMALL.activation_bytes_per_token(width=2, on_cpu=False, is_unsharded=False) == on_gpu == 328
    on_cpu = 2 * 8 * 2 + 2 * 8 * 2 + attention + mlp + 2 * 16  # inputs and outputs of the norms; product
    assert SMALL.activation_bytes_per_token(width=2, on_cpu=True, is_unsharded=False) == on_cpu == 208
    assert (
        SMALL.activation_bytes_per_token(width=2, on_cpu=True, is_unsharded=True) == on_cpu - 2 * 8 * 2 - 2 * 16 == 144
    )
    ends = 10 * (8 * (4 + 2) + 2 * 2 * 8) + 2 * 32 * 8  # the last norm, the head's input and gradient; the head's own
    assert SMALL.head_bytes(tokens=10, width=2, on_cpu=False, logits=10**6) == ends + 2 * 10 * 32 == 1952
    # In several chunks: two gradients of the head in bf16, and their sum in fp32.
    chunked = SMALL.head_bytes(tokens=10, width=2, on_cpu=False, logits=100)
    assert chunked == ends + 2 * 100 + (2 + 4) * 32 * 8
    frozen = SMALL.head_bytes(tokens=10, width=2, on_cpu=False, logits=100, is_trained=False)
    assert frozen == chunked - (2 + 2 + 4) * 32 * 8
    ends -= 10 * 8 * 4  # norms of a CPU save their input alone; it has a place for two chunks of logits
    assert SMALL.head_bytes(tokens=10, width=2, on_cpu=True, logits=100) == ends + 2 * 2 * 100
    assert SMALL.head_bytes(tokens=10, width=2, on_cpu=True, logits=200) == ends + 2 * 320


def test_the_plan_of_one_rank():
    estimate = small_plan()
    assert (estimate.weights, estimate.unsharded, estimate.gradients, estimate.optimizer) == (4000, 2000, 2000, 8000)
    assert estimate.activations == 10 * 2 * 328 + 1952 == 8512
    assert estimate.recomputed == 10 * 2 * (8 * 2) + 10 * 2 * 328 == 6880  # two layers need more than the head
    assert estimate.needed(checkpointing=False) == 24512 and estimate.needed(checkpointing=True) == 22880


@pytest.mark.parametrize(
    ("overrides", "changes", "expected"),
    [
        (["fsdp.model_dtype=bf16"], {}, {"weights": 2000, "optimizer": 4000}),
        # FSDP1 adds up the gradients of several micro-batches in bf16, FSDP2 in fp32.
        ([], {"trainable": 50}, {"gradients": 100, "optimizer": 400, "weights": 4000}),
        (["fsdp.strategy=fsdp2"], {"trainable": 50}, {"gradients": 200, "optimizer": 400, "weights": 4000}),
        ([], {"width": 4}, {"unsharded": 4000}),
        (["trainer.n_gpus_per_node=2"], {}, {"weights": 2000, "gradients": 2000, "optimizer": 4000}),
        (["trainer.n_gpus_per_node=2", "data.train_batch_size=2"], {"longest": 10}, {"gradients": 2000}),
        (["trainer.n_gpus_per_node=2", "fsdp.fsdp_size=1"], {}, {"weights": 4000}),
        (["fsdp.use_no_sync_for_gradient_accumulation=false", "trainer.n_gpus_per_node=2"], {}, {"gradients": 2000}),
        # Two of 20 layers and the gradients of one, and a matrix of 32 x 8, which is both embeddings and head.
        (["trainer.n_gpus_per_node=2"], {"dims": DEEP, "total": 10000}, {"unsharded": 2 * (1500 + 256)}),
        (["fsdp.reshard_after_forward=true"], {"dims": DEEP, "total": 10000}, {"unsharded": 2 * (1500 + 256)}),
        (["fsdp=fsdp2_offload"], {}, {"weights": 0, "optimizer": 0}),
        # The weights of a single GPU: FSDP1 converts two layers at a time, FSDP2 keeps all.
        (["fsdp.strategy=fsdp"], {"dims": DEEP, "total": 10000}, {"unsharded": 2 * (1500 + 256)}),
        (["fsdp.strategy=fsdp2"], {"dims": DEEP, "total": 10000}, {"unsharded": 2 * 10000}),
        # The end of the backward pass: gradients of the embeddings' 2,560 weights and their copies in fp32, a layer's
        # copies; the gathered weights are freed, on a single GPU but those of the embeddings.
        (
            ["trainer.n_gpus_per_node=2", "data.train_batch_size=2"],
            {"dims": WIDE, "total": 10000, "trainable": 10000, "longest": 1},
            {"recomputed": (4 + 2) * 2560 + 4 * 7440 // 20 - 2 * (1500 + 2560), "unsharded": 2 * (1500 + 2560)},
        ),
        # Embeddings and another matrix as head: FSDP2 has one of them gathered at a time, FSDP1 both.
        (
            ["trainer.n_gpus_per_node=2", "fsdp.strategy=fsdp2"],
            {"dims": WIDE, "total": 20000, "trainable": 20000},
            {"unsharded": 2 * (3000 + 2560)},
        ),
        (
            ["trainer.n_gpus_per_node=2", "fsdp.strategy=fsdp"],
            {"dims": WIDE, "total": 20000, "trainable": 20000},
            {"unsharded": 2 * (3000 + 5120)},
        ),
        (
            ["data.train_batch_size=1"],
            {"dims": WIDE, "total": 10000, "trainable": 10000, "longest": 1},
            {"recomputed": (4 + 2) * 2560 + 4 * 7440 // 20 - 2 * 1500},
        ),
        # With that other matrix FSDP2 has the weights of both, their gradients and one copy in fp32.
        (
            ["data.train_batch_size=1", "fsdp=fsdp2_offload"],
            {"dims": WIDE, "total": 20000, "trainable": 20000, "longest": 1},
            {"recomputed": (4 * 2 + 4) * 2560 - 2 * (3000 + 2560), "unsharded": 2 * (3000 + 2560)},
        ),
        # LoRA: 1,000 frozen weights in bf16 and 50 trained ones in fp32; the head has no gradient. Each projection has
        # separate inputs with FSDP1: three copies of 8 numbers for query, key, value, gate and up, one of 8.
        (
            ["lora.enabled=true", "fsdp.strategy=fsdp"],
            {"total": 1050, "trainable": 50},
            {
                "weights": 2 * 1000 + 4 * 50,
                "unsharded": 2 * 50,
                "activations": 10 * 2 * (328 + 2 * (3 * 8 + 8)) + 1952 - 2 * 32 * 8,
            },
        ),
        (
            ["lora.enabled=true", "fsdp.strategy=fsdp2"],
            {"dims": DEEP, "total": 10050, "trainable": 50},
            {"weights": 2 * 10000 + 4 * 50, "unsharded": 2 * (1005 + 256)},
        ),
        (["optim.optimizer=SGD"], {}, {"optimizer": 0}),
        (["optim.optimizer=SGD", "optim.override_optimizer_config={momentum: 0.9}"], {}, {"optimizer": 4000}),
        (["optim.optimizer=Adagrad"], {}, {"optimizer": 4000}),
        ([], {"on_cpu": True}, {"activations": 10 * 2 * 144 + 1952 - 10 * 4 * 8, "weights": 4000, "unsharded": 2000}),
        # In fp32 the head's gradient is added to its sum without a product beside it.
        (
            [],
            {"on_cpu": True, "width": 4},
            {"weights": 4000, "unsharded": 0, "activations": 10 * 2 * 328 + 10 * 3 * 4 * 8 + 4 * 10 * 32},
        ),
        (["lora.enabled=true"], {"on_cpu": True, "trainable": 50}, {"weights": 2 * 950 + 4 * 50, "unsharded": 2 * 50}),
        ([], {"on_cpu": True, "trainable": 50}, {"weights": 4000, "unsharded": 2 * 1000}),
        (["fsdp=fsdp2_offload"], {"on_cpu": True}, {"weights": 4000, "gradients": 4000, "optimizer": 8000}),
        (["fsdp.model_dtype=bf16"], {"on_cpu": True}, {"weights": 2000, "unsharded": 0, "gradients": 4000}),
        (
            ["trainer.n_gpus_per_node=2"],
            {"on_cpu": True},
            {"activations": 10 * 2 * 208 + 1952 - 10 * 4 * 8, "weights": 2000, "unsharded": 2000},
        ),
        (["trainer.n_gpus_per_node=2"], {"dims": DEEP, "total": 10000, "on_cpu": True}, {"unsharded": 20000}),
        # With one micro-batch gradients take the place of activations; two layers' are left at the end.
        ([], {"longest": 2}, {"gradients": 4000, "activations": 8 * 2 * 328}),
        (
            ["fsdp.strategy=fsdp2"],
            {"longest": 2, "total": 100, "trainable": 100},
            {"gradients": 400, "activations": 6512},
        ),
        (["data.micro_batch_size_per_gpu=2"], {}, {"activations": 20 * 2 * 328 + 3392}),
    ],
)
def test_what_changes_the_estimate(overrides, changes, expected):
    estimate = small_plan(*overrides, **changes)
    assert {key: getattr(estimate, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"query": 4096, "key": 1024, "intermediate": 14336, "has_head_norm": False}),
        ({"head_dim": 64}, {"query": 2048, "key": 512}),
        ({"num_key_value_heads": None}, {"key": 4096}),
        ({"model_type": "qwen3"}, {"has_head_norm": True}),
        ({"model_type": "gemma"}, {"has_head_norm": False, "norms": 2, "is_gemma": True}),
        ({"model_type": "gemma2"}, {"has_head_norm": False, "norms": 4, "is_gemma": True}),
        ({"model_type": "gemma3_text"}, {"has_head_norm": True, "norms": 4, "is_gemma": True}),
        ({"num_experts_per_tok": 8, "moe_intermediate_size": 768}, {"intermediate": 6144}),
        ({"num_experts_per_tok": 2}, {"intermediate": 28672}),
        ({"text_config": LLAMA | {"hidden_size": 512}}, {"hidden": 512}),
    ],
)
def test_sizes_are_read_from_the_models_config(change, expected):
    dims = ModelDims.of(LLAMA | change)
    assert {key: getattr(dims, key) for key in expected} == expected


@pytest.mark.parametrize("settings", [{"n_embd": 768, "n_layer": 12}, LLAMA | {"intermediate_size": [14336] * 32}])
def test_of_a_model_with_other_names_or_layers_that_differ_nothing_is_claimed(settings):
    assert ModelDims.of(settings) is None


@pytest.mark.parametrize("kind", ["as on a GPU", "on a CPU", "whole"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Llama", dict(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2)),
        ("Llama", SMOLLM2 | {"num_hidden_layers": 6, "vocab_size": 4096}),
        ("Qwen3", SMOLLM2 | {"num_hidden_layers": 2, "vocab_size": 4096, "head_dim": 128}),
        ("Gemma", SMOLLM2 | {"num_hidden_layers": 2, "vocab_size": 4096, "head_dim": 64}),
        ("Gemma3Text", SMOLLM2 | {"num_hidden_layers": 2, "vocab_size": 4096, "head_dim": 128}),
    ],
    ids=["tiny", "layers of SmolLM2-135M", "Qwen3", "Gemma", "Gemma 3"],
)
def test_autograd_saves_what_the_estimate_says(family, settings, dtype, kind):
    import transformers

    use_cpu()
    import sft_recipe.engine.attention.packed  # noqa: F401
    from sft_recipe.engine.attention.documents import PackedDocuments
    from sft_recipe.engine.attention.prefix_sharing import concatenate
    from sft_recipe.engine.cpu.recompute import recompute_norms_and_mlps
    from sft_recipe.engine.cpu.unsharded import UnshardedModel
    from sft_recipe.engine.loss import patch_chunked_cross_entropy

    on_cpu, is_unsharded = kind != "as on a GPU", kind == "whole"
    settings = {"num_attention_heads": 4, "num_key_value_heads": 2, **settings}
    config = getattr(transformers, f"{family}Config")(**settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION)
    model.to_empty(device="cpu").to(dtype).train()
    for part in [*model.parameters(), *model.buffers()]:
        part.data.fill_(0.01)
    own = {part.untyped_storage().data_ptr() for part in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    assert patch_chunked_cross_entropy(model)
    if on_cpu:
        recompute_norms_and_mlps(model)
    if is_unsharded:
        UnshardedModel(model, dtype)
    lengths = [50, 30, 48]
    ids, targets = torch.arange(128)[None], torch.arange(128)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = PackedDocuments(concatenate(lengths).segments)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        inputs = dict(input_ids=ids, position_ids=positions, use_cache=False, attention_mask=documents)
        loss, _ = model(**inputs, positions=targets, targets=targets, tokens=torch.ones((), dtype=torch.long))
    assert loss.requires_grad
    dims, width = ModelDims.of(config.to_dict()), dtype.itemsize
    planned = 128 * dims.layers * dims.activation_bytes_per_token(width, on_cpu, is_unsharded)
    planned += dims.head_bytes(128, width, on_cpu, logits=0)
    if is_unsharded:  # the head's gradient is in the sums already
        planned -= width * dims.vocabulary * dims.hidden
    assert sum(size for size, _ in kept.values()) == pytest.approx(planned, rel=0.07)
