"""Training steps on GPUs that do not exist: they run, with the right kernels, dtypes and devices, and never wait."""

import pytest
from transformers import T5Config

from sft_recipe.engine.rehearsal.device import FakeGpu
from sft_recipe.engine.rehearsal.step import Case
from tests.engine.rehearsal.conftest import FAMILIES

GIB = 2**30
T4 = FakeGpu("Tesla T4", 15 * GIB, (7, 5))
P100 = FakeGpu("Tesla P100", 16 * GIB, (6, 0))
TOKENS = 640  # of a document, different from all sizes of the models
STRATEGIES = {
    "fsdp": ["fsdp.strategy=fsdp"],
    "fsdp2": ["fsdp.strategy=fsdp2"],
    "fsdp_offload": ["fsdp=fsdp_offload"],
    "fsdp2_offload": ["fsdp=fsdp2_offload"],
}
LORA = ["lora.enabled=true"]
# peft multiplies the adapters of a router outside of their FSDP1 units; a run is refused before its first step.
ON_ATTENTION = ["lora.target_modules=[q_proj,k_proj,v_proj,o_proj]"]
# Masks of tokens x tokens, for soft-capping and sinks, and experts whose number of tokens the host reads.
COMPUTED_IN_FULL = ("Gemma2", "GptOss")
WITH_EXPERTS = ("Qwen3Moe", "GptOss")


def rehearse(session, folder, overrides, ranks=1, checkpointing=False, tokens=TOKENS, **case):
    chosen = f"model.enable_gradient_checkpointing={str(checkpointing).lower()}"
    return session.run(Case([f"model.path={folder}", chosen, *overrides], ranks, tokens, **case))


def check(step, is_lora=False, devices=("cuda", "cuda"), compute="torch.bfloat16"):
    """Assert what holds for every step on a GPU since Ampere."""
    assert step.dtypes["trained"] == step.dtypes["state"] == step.dtypes["gradients"] == ["torch.float32"]
    assert step.dtypes["frozen"] == ([compute] if is_lora else [])
    assert set(step.dtypes["buffers"]) <= {"torch.float32"}
    assert step.kernels.get("aten._fused_adamw_.default", 0) > 0
    assert (step.devices["trained"], step.devices["state"]) == ([devices[0]], [devices[1]])
    return step


def waiting(step):
    """Return the calls that wait for the device, but for the one that reads the loss after the last micro-batch."""
    return {call for call in step.waits if not call.endswith("_over_sequence_ranks")}


@pytest.mark.parametrize(
    ("strategy", "ranks", "is_lora", "checkpointing"),
    [
        ("fsdp", 1, False, True),
        ("fsdp2", 8, True, False),
        ("fsdp", 8, True, True),
        *[
            pytest.param(strategy, ranks, is_lora, checkpointing, marks=pytest.mark.slow)
            for strategy in STRATEGIES
            for ranks in (1, 8)
            for is_lora in (False, True)
            for checkpointing in (False, True)
            if (strategy, ranks, is_lora, checkpointing)
            not in {("fsdp", 1, False, True), ("fsdp2", 8, True, False), ("fsdp", 8, True, True)}
        ],
        pytest.param("fsdp", 1024, False, True, marks=pytest.mark.slow),
        pytest.param("fsdp2", 1024, True, True, marks=pytest.mark.slow),
    ],
)
def test_step_runs_on_varlen_attention_without_waiting(session, folder_of, strategy, ranks, is_lora, checkpointing):
    overrides = [*STRATEGIES[strategy], *(LORA if is_lora else [])]
    # With FSDP1 verl moves the weights to the GPU for training, and the optimizer's state for each step.
    devices = {"fsdp_offload": ("cuda", "cpu"), "fsdp2_offload": ("cpu", "cpu")}.get(strategy, ("cuda", "cuda"))
    step = check(rehearse(session, folder_of("Llama"), overrides, ranks, checkpointing), is_lora, devices)
    assert step.kernels["torch_attn._varlen_attn.default"] == 2 * 2 * 2 * (1 + checkpointing)
    assert ranks == 1024 or step.largest < TOKENS * TOKENS  # 1,024 ranks pad what they gather
    assert not waiting(step)
    if ranks > 1:
        assert step.kernels["c10d._reduce_scatter_base_.default"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "checkpointing"), [(1, True), (8, False)])
def test_weights_in_4_bits_are_multiplied_and_in_the_backward_pass_unpacked(session, folder_of, ranks, checkpointing):
    step = check(
        rehearse(session, folder_of("Llama"), [*LORA, "lora.quantize=true"], ranks, checkpointing), is_lora=True
    )
    forward, backward = (step.kernels[f"bitsandbytes.{name}.default"] for name in ("gemm_4bit", "dequantize_4bit"))
    assert forward == (1 + checkpointing) * backward > 0
    assert not waiting(step)


def test_frozen_weights_that_are_shared_stay_parameters_on_one_gpu(session, folder_of):
    check(rehearse(session, folder_of("Llama", tie_word_embeddings=True), LORA), is_lora=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_shard_groups_of_one_machine(session, folder_of, strategy):
    step = check(rehearse(session, folder_of("Llama"), [*STRATEGIES[strategy], "fsdp.fsdp_size=8"], ranks=16))
    assert step.kernels["c10d._reduce_scatter_base_.default"] > 0 and step.kernels["c10d.allreduce_.default"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "Llama"])
def test_architectures(session, folder_of, family, is_lora):
    lora = [*LORA, *(ON_ATTENTION if family == "Qwen3Moe" else [])]
    step = check(rehearse(session, folder_of(family), lora if is_lora else [], ranks=8, checkpointing=True), is_lora)
    if family in COMPUTED_IN_FULL:
        assert "torch_attn._varlen_attn.default" not in step.kernels
    else:
        assert step.kernels["torch_attn._varlen_attn.default"] == 16 and step.largest < TOKENS * TOKENS
    assert family in WITH_EXPERTS or not waiting(step)


@pytest.mark.parametrize(
    ("gpu", "dtype"), [(T4, "torch.float16"), pytest.param(P100, "torch.float32", marks=pytest.mark.slow)]
)
def test_gpus_without_bf16_and_flash_attention(session, folder_of, gpu, dtype):
    step = rehearse(session, folder_of("Llama"), LORA, gpu=gpu)
    check(step, is_lora=True, compute=dtype)
    assert not any("varlen" in name for name in step.kernels)


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [
        ("fsdp", 1),  # gradients of shared weights stay in bf16 between micro-batches
        pytest.param("fsdp", 8, marks=pytest.mark.slow),
        pytest.param("fsdp2", 1, marks=pytest.mark.slow),
        pytest.param("fsdp2", 8, marks=pytest.mark.slow),
    ],
)
def test_encoder_decoders(session, tmp_path, strategy, ranks):
    sizes = dict(d_model=64, d_kv=16, d_ff=160, num_layers=2, num_heads=4, vocab_size=512)
    config = T5Config(decoder_start_token_id=0, pad_token_id=0, architectures=["T5ForConditionalGeneration"], **sizes)
    config.save_pretrained(tmp_path)
    step = check(rehearse(session, str(tmp_path), STRATEGIES[strategy], ranks, checkpointing=True))
    # transformers looks at the mask, for attention with a bias; nothing else waits.
    assert {call.split(", ")[-1] for call in waiting(step)} == {"eager_mask"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_optimizers_of_8_bits(session, folder_of, name):
    pytest.importorskip("bitsandbytes")
    overrides = [f"optim.optimizer={name}", "optim.optimizer_impl=bitsandbytes.optim"]
    step = rehearse(session, folder_of("Llama"), overrides)
    assert step.kernels["bitsandbytes.optimizer_update_8bit_blockwise.default"] > 0
    assert "torch.uint8" in step.dtypes["state"] and step.dtypes["trained"] == ["torch.float32"]


@pytest.mark.parametrize(
    ("strategy", "is_lora"),
    [
        ("fsdp", False),
        pytest.param("fsdp", True, marks=pytest.mark.slow),
        pytest.param("fsdp2", False, marks=pytest.mark.slow),
        pytest.param("fsdp2", True, marks=pytest.mark.slow),
    ],
)
def test_offloaded_activations_are_not_on_the_gpu(session, folder_of, strategy, is_lora):
    overrides = [*STRATEGIES[strategy], *(LORA if is_lora else [])]
    offload = [*overrides, "model.enable_activation_offload=true"]
    folder = folder_of("Llama", num_hidden_layers=8)
    kept, moved = (
        rehearse(session, folder, chosen, checkpointing=True, tokens=8192, micro_batches=1)
        for chosen in (overrides, offload)
    )
    inputs = 8 * 8192 * 64 * 2  # of all layers, in bf16
    assert kept.peaks["forward and backward"] - moved.peaks["forward and backward"] > 0.8 * inputs
    assert 0.7 * inputs < kept.estimate - moved.estimate <= inputs
