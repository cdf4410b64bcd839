"""Optimizers and arguments that cannot train are refused before anything is loaded; all others are accepted."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from sft_recipe.config.compose import load_config
from sft_recipe.config.optimizer import UNSUITABLE, check_optimizer
from sft_recipe.errors import ConfigError, PreflightError

# Every class of torch.optim, from PyTorch itself.
ALL = {name for name, value in vars(torch.optim).items() if isinstance(value, type)} - {"Optimizer"}


def check(*overrides, device="cpu"):
    check_optimizer(load_config([text if text.startswith("fsdp") else f"optim.{text}" for text in overrides]), device)


@pytest.mark.parametrize("name", sorted(ALL - set(UNSUITABLE)))
def test_optimizer_of_pytorch_takes_the_arguments_that_verl_passes(name):
    check(f"optimizer={name}", "weight_decay=0.1")


@pytest.mark.parametrize("name", UNSUITABLE)
def test_optimizer_that_cannot_train_is_refused_in_words(name):
    assert name in ALL
    with pytest.raises(ConfigError, match=f"optim.optimizer={name} cannot train here: it "):
        check(f"optimizer={name}")


@pytest.mark.parametrize(
    ("overrides", "expected_text"),
    [
        (["optimizer=Foo"], "torch.optim has no optimizer Foo; it has ASGD, Adadelta,"),
        (["optimizer=adamw"], "Did you mean AdamW?"),
        (["optimizer=AdmaW"], "Did you mean AdamW?"),
        (
            ["optimizer=AdamW8bit"],
            "no optimizer AdamW8bit; set optim.optimizer=AdamW8bit optim.optimizer_impl=bitsandbytes.optim",
        ),
        (
            ["optimizer=paged_adamw_8bit"],
            "set optim.optimizer=PagedAdamW8bit optim.optimizer_impl=bitsandbytes.optim",
        ),
        (["optimizer=adamw_torch", "optimizer_impl=torch.nn"], "set optim.optimizer_impl=torch.optim"),
        (["optimizer=Optimizer"], "torch.optim has no optimizer Optimizer"),
        (["optimizer=lr_scheduler"], "torch.optim has no optimizer lr_scheduler"),
        (
            ["override_optimizer_config={foo: 1}"],
            "has foo, which torch.optim.AdamW does not accept; it has eps, amsgrad,",
        ),
        (["override_optimizer_config={epss: 1}"], "Did you mean eps?"),
        (["override_optimizer_config={eps: -1}"], "torch.optim.AdamW refuses its arguments: Invalid epsilon value: -1"),
        (["override_optimizer_config={eps: small}"], "torch.optim.AdamW refuses its arguments"),
        (["override_optimizer_config={betas: [0.9, 1]}"], "betas, which has its key: set optim.betas"),
        (["override_optimizer_config={lr: 5}"], "lr, which has its key: set optim.lr"),
        (["optimizer=SGD", "override_optimizer_config={weight_decay: 3}"], "set optim.weight_decay"),
        (["override_optimizer_config={params: []}"], "has params, which torch.optim.AdamW does not accept"),
        (["override_optimizer_config={differentiable: true}"], "`fused` does not support `differentiable`"),
        (["optimizer=SGD", "override_optimizer_config={nesterov: true}"], "Nesterov momentum requires a momentum"),
        (["fsdp=megatron", "optimizer=SGD"], "strategy=megatron has its own Adam"),
        (["fsdp=megatron", "override_optimizer_config={eps: 1e-6}"], "strategy=megatron has its own Adam"),
        (["fsdp=megatron", "lr_scheduler_type=onecycle"], "strategy=megatron has its own schedules"),
        (["fsdp=megatron", "zero_indexed_step=false"], "strategy=megatron has its own schedules"),
    ],
)
def test_optimizer_or_argument_that_cannot_work_is_one_message(overrides, expected_text):
    with pytest.raises(ConfigError) as caught:
        check(*overrides)
    assert expected_text in str(caught.value)


@pytest.mark.parametrize("module", ["torch.optmi", "nothing", "''", ".x"])
def test_module_that_cannot_be_imported_is_one_message(module):
    with pytest.raises(PreflightError, match="cannot be imported"):
        check(f"optimizer_impl={module}")


@pytest.mark.parametrize(
    ("fsdp", "device", "ranks", "is_refused"),
    [("fsdp2", "cpu", 1, False), ("fsdp2", "cpu", 2, True), ("fsdp", "cpu", 2, True), ("fsdp2", "cuda", 1, True)]
    + [("fsdp", "cuda", 2, False), ("fsdp2", "auto", 1, False), ("fsdp2", "auto", 2, True)],
)
def test_adafactor_is_refused_where_matrices_are_sharded(fsdp, device, ranks, is_refused):
    config = load_config(["optim.optimizer=Adafactor", f"fsdp={fsdp}", f"trainer.n_gpus_per_node={ranks}"])
    if is_refused:
        with pytest.raises(ConfigError, match="Adafactor needs complete matrices"):
            check_optimizer(config, device)
    else:
        check_optimizer(config, device)


@pytest.mark.parametrize(
    ("overrides", "device", "expected_text"),
    [
        (["trainer.n_gpus_per_node=2"], "cuda", "that several ranks cannot share; train on one rank"),
        (["fsdp.strategy=fsdp2"], "cuda", "does not know fsdp2's tensors; use strategy=fsdp"),
        ([], "cpu", "and this run is on a CPU; use AdamW8bit"),
        (["fsdp.optimizer_offload=true"], "cuda", "moves its state itself; set fsdp.optimizer_offload=false"),
        ([], "cuda", None),
    ],
)
def test_where_an_optimizer_of_bitsandbytes_cannot_train_is_one_message(overrides, device, expected_text):
    class PagedAdamW8bit(torch.optim.AdamW):
        pass

    name = ["optim.optimizer=PagedAdamW8bit", "optim.optimizer_impl=bitsandbytes.optim"]
    config = load_config([*name, *overrides])
    with patch(
        "sft_recipe.config.optimizer.import_module", return_value=SimpleNamespace(PagedAdamW8bit=PagedAdamW8bit)
    ):
        if expected_text is None:
            check_optimizer(config, device)
        else:
            with pytest.raises(ConfigError, match=expected_text):
                check_optimizer(config, device)


def test_missing_bitsandbytes_is_one_message_that_names_the_extra():
    missing = patch("sft_recipe.config.optimizer.import_module", side_effect=ImportError)
    with missing, pytest.raises(PreflightError, match=r"pip install -e '.\[bitsandbytes\]'"):
        check("optimizer_impl=bitsandbytes.optim", "optimizer=AdamW8bit")


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "NAdam", "AdEMAMix8bit"])
def test_arguments_that_are_checked_are_those_that_verl_passes(name):
    from sft_recipe.engine.cpu.platform import use_cpu

    use_cpu()
    from verl.workers.config.optimizer import build_optimizer

    from sft_recipe.engine.verl_config import _optim

    calls = []

    class Recorder:
        def __init__(self, params, **arguments):
            calls.append(arguments)

    config = load_config([f"optim.optimizer={name}", "optim.override_optimizer_config={eps: 1e-7}", "optim.lr=0.5"])
    with patch.object(torch.optim, name, Recorder, create=True):
        check_optimizer(config, "cpu")
        build_optimizer([], _optim(config, 10))
    assert calls[0] == calls[1] and calls[0]["lr"] == 0.5


def test_optimizer_of_another_package_is_built_as_well():
    class Strange(torch.optim.SGD):
        def __init__(self, params, *, lr, weight_decay, gamma):
            assert gamma < 1, "gamma must be small"
            super().__init__(params, lr, weight_decay=weight_decay)

    with patch("sft_recipe.config.optimizer.import_module", return_value=SimpleNamespace(Strange=Strange)):
        check("optimizer_impl=strange", "optimizer=Strange", "override_optimizer_config={gamma: 0.5}")
        with pytest.raises(ConfigError, match="strange.Strange refuses its arguments: gamma must be small"):
            check("optimizer_impl=strange", "optimizer=Strange", "override_optimizer_config={gamma: 2}")
        with pytest.raises(ConfigError, match="missing 1 required keyword-only argument: 'gamma'"):
            check("optimizer_impl=strange", "optimizer=Strange")
