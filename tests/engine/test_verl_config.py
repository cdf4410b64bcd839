"""Configuration keys reach verl, offloading is off on CPUs, and Megatron's config is built from the same keys."""

import importlib
import math
import os

import pytest

from sft_recipe.config.compose import load_config
from sft_recipe.engine.cpu.platform import KERNEL_CACHE_SIZES, PlatformCPU, use_cpu
from sft_recipe.errors import PreflightError
from sft_recipe.models.resolve import ResolvedModel


@pytest.fixture(scope="module")
def verl_config():
    use_cpu()
    return importlib.import_module("sft_recipe.engine.verl_config")


def build(verl_config, model_dir, device, *overrides):
    config = load_config([f"model.path={model_dir}", *overrides])
    return verl_config.build_verl_config(config, ResolvedModel(model_dir, str(model_dir)), 100, device)


def test_verl_uses_the_cpu_platform(verl_config):
    from verl.utils.device import get_device_name, get_torch_device

    assert get_device_name() == "cpu"
    assert isinstance(PlatformCPU().current_device().type, str)
    assert get_torch_device().max_memory_allocated() > 0


def test_sizes_of_kernel_caches_are_set_unless_the_user_has_set_them(monkeypatch):
    first, second = KERNEL_CACHE_SIZES
    monkeypatch.setenv(first, "7")
    monkeypatch.delenv(second, raising=False)
    use_cpu()
    assert (os.environ[first], os.environ[second]) == ("7", KERNEL_CACHE_SIZES[second])


def test_verl_uses_the_sft_engine(verl_config):
    from verl.workers.engine import EngineRegistry

    from sft_recipe.engine.sft_engine import SFTEngine

    for backend in ("fsdp", "fsdp2"):
        assert EngineRegistry.get_engine_cls("language_model", backend) is SFTEngine
        assert EngineRegistry._engines["language_model"][backend][("cuda", "nvidia")] is SFTEngine


@pytest.mark.parametrize(
    ("override", "part", "key", "expected"),
    [
        ("optim.lr=3e-4", "optim", "lr", 3e-4),
        ("optim.weight_decay=0.2", "optim", "weight_decay", 0.2),
        ("optim.clip_grad=0.5", "optim", "clip_grad", 0.5),
        ("optim.clip_grad=0", "optim", "clip_grad", math.inf),
        ("optim.clip_grad=null", "optim", "clip_grad", math.inf),
        ("optim.betas=[0.8,0.9]", "optim", "betas", (0.8, 0.9)),
        ("fsdp.param_offload=true", "engine", "param_offload", True),
        ("actor_rollout_ref.actor.fsdp_config.optimizer_offload=true", "engine", "optimizer_offload", True),
        ("fsdp=fsdp2_offload", "engine", "offload_policy", True),
        ("fsdp.reshard_after_forward=false", "engine", "reshard_after_forward", False),
        ("fsdp.fsdp_size=2", "engine", "fsdp_size", 2),
        ("fsdp.model_dtype=bf16", "engine", "model_dtype", "bf16"),
        ("lora=r16", "model", "lora_rank", 16),
        ("lora=r16", "model", "lora_alpha", 32),
        ("lora.rank=16", "model", "lora_rank", 0),
        ("model.trust_remote_code=true", "model", "trust_remote_code", True),
        ("model.enable_gradient_checkpointing=false", "model", "enable_gradient_checkpointing", False),
    ],
)
def test_keys_reach_verl(verl_config, model_dir, override, part, key, expected):
    built = build(verl_config, model_dir, "cuda", "fsdp.mixed_precision.param_dtype=bf16", override)
    assert getattr(getattr(built, part), key) == expected


@pytest.mark.parametrize(("device", "strategy", "expected"), [("cpu", "fsdp", "fsdp2"), ("cuda", "fsdp", "fsdp")])
def test_fsdp_runs_as_fsdp2_on_a_cpu(verl_config, model_dir, device, strategy, expected):
    built = build(verl_config, model_dir, device, f"fsdp.strategy={strategy}", "fsdp.mixed_precision.param_dtype=bf16")
    assert built.engine.strategy == expected


@pytest.mark.parametrize(
    ("device", "overrides", "expected"),
    [
        ("cuda", [], False),
        ("cuda", ["trainer.n_gpus_per_node=2"], True),
        ("cuda", ["fsdp=fsdp2_offload"], True),
        ("cuda", ["lora.enabled=true"], True),
        ("cuda", ["fsdp.reshard_after_forward=true"], True),
        ("cuda", ["trainer.n_gpus_per_node=2", "fsdp.reshard_after_forward=false"], False),
        ("cpu", ["trainer.n_gpus_per_node=2"], False),
        ("cpu", ["fsdp=fsdp2_offload"], False),
        ("cpu", ["trainer.n_gpus_per_node=2", "fsdp.reshard_after_forward=true"], True),
    ],
)
def test_weights_stay_gathered_where_that_is_faster(verl_config, model_dir, device, overrides, expected):
    engine = build(verl_config, model_dir, device, "fsdp.mixed_precision.param_dtype=bf16", *overrides).engine
    assert engine.reshard_after_forward is expected


@pytest.mark.parametrize(("device", "expected"), [("cpu", False), ("cuda", True)])
def test_gradient_checkpointing_is_on_by_default_on_gpus_only(verl_config, model_dir, device, expected):
    built = build(verl_config, model_dir, device, "fsdp.mixed_precision.param_dtype=bf16")
    assert built.model.enable_gradient_checkpointing is expected


def test_offloading_is_off_on_a_cpu(verl_config, model_dir):
    engine = build(verl_config, model_dir, "cpu", "fsdp=fsdp_offload").engine
    assert not engine.param_offload and not engine.optimizer_offload


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_compute_dtype_is_the_configured_one(verl_config, model_dir, dtype):
    engine = build(verl_config, model_dir, "cpu", f"fsdp.mixed_precision.param_dtype={dtype}").engine
    assert engine.mixed_precision["param_dtype"] == dtype


def test_ulysses_needs_an_attention_that_exchanges_heads(verl_config, model_dir):
    shared = "fsdp.ulysses_sequence_parallel_size=2"
    assert build(verl_config, model_dir, "cpu", shared).engine.ulysses_sequence_parallel_size == 2
    with pytest.raises(PreflightError, match="needs model.attn_implementation=sft_packed or flash attention"):
        build(verl_config, model_dir, "cpu", shared, "model.attn_implementation=sdpa")


def test_megatron_is_configured_from_the_same_keys(verl_config):
    sizes = ["fsdp.tensor_model_parallel_size=4", "fsdp.pipeline_model_parallel_size=2", "fsdp.context_parallel_size=2"]
    config = load_config(["fsdp=megatron", *sizes, "fsdp.param_offload=true", "optim.lr=1e-5"])
    engine = verl_config.megatron_engine(config.fsdp, seed=7)
    assert engine.strategy == "megatron" and engine.seed == 7 and engine.param_offload
    assert engine.tensor_model_parallel_size == 4
    assert engine.pipeline_model_parallel_size == 2
    assert engine.context_parallel_size == 2
    optim = verl_config._megatron_optim(config, 100)
    assert (optim.lr, optim.lr_decay_style, optim.total_training_steps) == (1e-5, "cosine", 100)
    unclipped = load_config(["fsdp=megatron", *sizes, "optim.clip_grad=0"])
    assert verl_config._megatron_optim(unclipped, 100).clip_grad == math.inf


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=1e-5", {"fused": True}),
        ("optim.optimizer=SGD", {}),
        ("optim.override_optimizer_config={fused: false}", {"fused": False}),
        ("optim.override_optimizer_config={foreach: true, eps: 1e-6}", {"foreach": True, "eps": 1e-6}),
        ("optim.override_optimizer_config={eps: 1e-6}", {"fused": True, "eps": 1e-6}),
        ("optim.optimizer_impl=torchao.optim", {}),
    ],
)
def test_adam_is_fused_unless_the_user_chooses_otherwise(verl_config, model_dir, override, expected):
    assert build(verl_config, model_dir, "cpu", override).optim.override_optimizer_config == expected


def test_fused_adam_step_equals_the_unfused_one(verl_config, model_dir):
    import torch
    from verl.workers.config.optimizer import build_optimizer

    def steps(*overrides):
        built = build(verl_config, model_dir, "cpu", "optim.lr=1e-2", "optim.weight_decay=0.1", *overrides)
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(40, 50, generator=generator))
        optimizer = build_optimizer([weight], built.optim)
        for _ in range(5):
            weight.grad = torch.randn(40, 50, generator=generator)
            optimizer.step()
        return weight.detach()

    plain = steps("optim.override_optimizer_config={fused: false, foreach: false}")
    torch.testing.assert_close(steps(), plain, rtol=1e-6, atol=1e-7)
