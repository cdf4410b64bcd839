"""The memory plan: its arithmetic by hand, what autograd really keeps, and the choice that follows."""

from pathlib import Path

import pytest
import torch

from sft_recipe.config.auto import PACKED_ATTENTION
from sft_recipe.config.compose import load_config
from sft_recipe.engine.cpu.platform import use_cpu
from sft_recipe.errors import PreflightError
from sft_recipe.models.memory_estimate import GIB, MemoryEstimate, ModelDims, estimate_memory
from tests.support import tiny
from tests.support.runs import metrics, run_here
from tests.support.small_run import arguments

SMALL = ModelDims(layers=2, hidden=8, intermediate=16, vocabulary=32, heads=2, query=8, key=4)
DEEP = ModelDims(layers=20, hidden=8, intermediate=16, vocabulary=32, heads=2, query=8, key=4)
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
    return estimate_memory(config, dims, total, trainable, width, on_cpu, longest, logits, device)


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
    assert SMALL.head_bytes(tokens=10, width=2, on_cpu=False, logits=10**6) == ends + 2 * 2 * 10 * 32 == 2592
    assert SMALL.head_bytes(tokens=10, width=2, on_cpu=False, logits=100) == ends + 2 * 2 * 100


def test_the_plan_of_one_rank():
    estimate = small_plan()
    assert (estimate.weights, estimate.unsharded, estimate.gradients, estimate.optimizer) == (4000, 2000, 4000, 8000)
    assert estimate.activations == 10 * 3 * 328 + 2592 == 12432
    assert estimate.recomputed == 10 * (2 * 328 + 2 * (8 * 2)) + 2592 == 9472
    assert estimate.needed(checkpointing=False) == 30432 and estimate.needed(checkpointing=True) == 27472


@pytest.mark.parametrize(
    ("overrides", "changes", "expected"),
    [
        (["fsdp.model_dtype=bf16"], {}, {"weights": 2000, "optimizer": 4000}),
        ([], {"trainable": 50}, {"gradients": 200, "optimizer": 400, "weights": 4000}),
        ([], {"width": 4}, {"unsharded": 4000}),
        (["trainer.n_gpus_per_node=2"], {}, {"weights": 2000, "gradients": 4000, "optimizer": 4000}),
        (["trainer.n_gpus_per_node=2", "data.train_batch_size=2"], {"longest": 10}, {"gradients": 2000}),
        (["trainer.n_gpus_per_node=2", "fsdp.fsdp_size=1"], {}, {"weights": 4000}),
        (["fsdp.use_no_sync_for_gradient_accumulation=false", "trainer.n_gpus_per_node=2"], {}, {"gradients": 2000}),
        # Two of 20 layers, and two matrices of 32 x 8.
        (["trainer.n_gpus_per_node=2"], {"dims": DEEP, "total": 10000}, {"unsharded": 2 * (1000 + 512)}),
        (["fsdp.reshard_after_forward=true"], {"dims": DEEP, "total": 10000}, {"unsharded": 2 * (1000 + 512)}),
        (["fsdp=fsdp2_offload"], {}, {"weights": 0, "optimizer": 0}),
        ([], {"on_cpu": True}, {"activations": 10 * 3 * 144 + 2592 - 10 * 4 * 8, "weights": 4000, "unsharded": 2000}),
        ([], {"on_cpu": True, "width": 4}, {"weights": 4000, "unsharded": 0}),
        ([], {"on_cpu": True, "trainable": 50}, {"weights": 4000, "unsharded": 2 * 50}),
        (["fsdp=fsdp2_offload"], {"on_cpu": True}, {"weights": 4000, "gradients": 4000, "optimizer": 8000}),
        (["fsdp.model_dtype=bf16"], {"on_cpu": True}, {"weights": 2000, "unsharded": 0, "gradients": 4000}),
        (
            ["trainer.n_gpus_per_node=2"],
            {"on_cpu": True},
            {"activations": 10 * 3 * 208 + 2592 - 10 * 4 * 8, "weights": 2000, "unsharded": 2000},
        ),
        (["trainer.n_gpus_per_node=2"], {"dims": DEEP, "total": 10000, "on_cpu": True}, {"unsharded": 20000}),
        ([], {"longest": 2}, {"activations": 8 * 3 * 328 + 2176}),
        (["data.micro_batch_size_per_gpu=2"], {}, {"activations": 20 * 3 * 328 + 4672}),
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
    ],
    ids=["tiny", "layers of SmolLM2-135M", "Qwen3"],
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
        UnshardedModel(model, dtype, converts_frozen=False)
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


@pytest.fixture
def choose(monkeypatch):
    """Return a function: the choice for SMALL on a device with that many bytes, and the messages."""
    use_cpu()
    from sft_recipe.models import memory_estimate
    from sft_recipe.models.stats import ModelStats

    def chosen(memory, *overrides, dims=SMALL):
        monkeypatch.setattr(memory_estimate, "device_memory", lambda device: memory)
        monkeypatch.setattr(memory_estimate.dist, "all_reduce", lambda tensor, op: None)
        compute = "fsdp.mixed_precision.param_dtype=bf16"
        config = load_config(["data.max_length=10", "data.train_batch_size=4", compute, *overrides])
        said: list[str] = []
        config, estimate = memory_estimate.resolve_activation_checkpointing(
            config, ModelStats(1000, 1000, dims), 100, "cuda", 2**28, said.append
        )
        return config.model.enable_gradient_checkpointing, estimate, said

    return chosen


# 30,432 bytes are needed without, 27,472 with; nine tenths of a device are used.
@pytest.mark.parametrize(
    ("memory", "override", "expected", "warns"),
    [
        (33814, [], False, False),
        (33813, [], True, False),
        (30524, [], True, True),
        (33813, ["model.enable_gradient_checkpointing=false"], False, True),
        (10**6, ["model.enable_gradient_checkpointing=true"], True, False),
    ],
)
def test_checkpointing_is_on_only_where_memory_requires_it(choose, memory, override, expected, warns):
    chosen, estimate, said = choose(memory, *override)
    assert chosen is expected and isinstance(estimate, MemoryEstimate)
    assert bool(said) == warns and all("MICRO_BATCH_SIZE" in text for text in said)


def test_run_does_not_start_when_weights_and_optimizer_state_exceed_the_device(choose):
    assert choose(12000)[0] is True
    with pytest.raises(PreflightError, match="weights and optimizer state exceed device memory.*N_GPUS"):
        choose(11999)


@pytest.mark.parametrize("case", [{"dims": None}, {"overrides": ["fsdp=megatron"]}])
def test_nothing_is_decided_without_an_estimate(choose, case):
    chosen, estimate, _ = choose(1, *case.pop("overrides", []), **case)
    assert (chosen, estimate) == ("auto", None)


def test_banner_shows_the_estimate():
    estimate = MemoryEstimate(
        weights=4 * GIB, unsharded=0, gradients=0, optimizer=0, activations=8 * GIB, recomputed=GIB, device=24 * GIB
    )
    assert estimate.describe(checkpointing=False) == "needs about 12.0 of 24.0 GiB"
    assert estimate.describe(checkpointing=True) == "needs about 5.0 of 24.0 GiB, 12.0 without"


def test_memory_of_a_cpu_rank_is_its_part_of_the_machine(monkeypatch, tmp_path):
    use_cpu()
    from sft_recipe.models import memory_estimate

    monkeypatch.setattr(memory_estimate, "CGROUP_LIMITS", [str(tmp_path / "none"), str(tmp_path / "limit")])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    machine = memory_estimate.psutil.virtual_memory().total
    assert memory_estimate.device_memory("cpu") == machine // 2
    for text, expected in (("max\n", machine // 2), (str(GIB), GIB // 2)):
        (tmp_path / "limit").write_text(text)
        assert memory_estimate.device_memory("cpu") == expected


def test_checkpointing_changes_no_number_and_may_change_on_resume(tmp_path, monkeypatch, capfd):
    model = tiny.build_model(tmp_path / "model")
    use_cpu()
    from sft_recipe.models import memory_estimate

    plans = []
    monkeypatch.setattr(
        memory_estimate, "estimate_memory", lambda *facts: plans.append(estimate_memory(*facts)) or plans[-1]
    )

    def run(folder: Path, memory: int, steps: int, *more: str) -> str:
        monkeypatch.setattr(memory_estimate, "device_memory", lambda device: memory)
        words = arguments(model, folder, "data.val_files=null", f"trainer.total_training_steps={steps}", *more)
        assert run_here(*words) == 0
        return " ".join(capfd.readouterr().out.split())

    assert "gradient checkpointing off (needs about" in run(tmp_path / "much", 2**40, 4)
    needed = int((plans[0].needed(checkpointing=False) + plans[0].needed(checkpointing=True)) / 2 / 0.9)
    assert "gradient checkpointing on (needs about" in run(tmp_path / "little", needed, 4)
    run(tmp_path / "both", 2**40, 2, "optim.lr_scheduler_type=constant")
    assert "gradient checkpointing on" in run(
        tmp_path / "both", needed, 4, "optim.lr_scheduler_type=constant", "trainer.resume_from=auto"
    )
    rows = [[row["train/loss"] for row in metrics(tmp_path / name / "out")] for name in ("much", "little")]
    assert rows[0] == rows[1] and len(metrics(tmp_path / "both" / "out")) == 4
