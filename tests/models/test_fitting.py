"""Settings that fit: one change where one suffices, each verified, the least drastic value of it."""

import pytest

from sft_recipe.config.compose import load_config
from sft_recipe.models.fitting import changed, fitting_options


def options(fits, *overrides, on_gpus=True):
    return fitting_options(load_config(["data.max_length=4096", *overrides]), fits, on_gpus)


def test_single_changes_come_first_with_the_least_drastic_value():
    found = options(lambda config: config.data.token_budget * (8 // config.trainer.world_size) <= 8192)
    assert found == ["--max_length 1024", "--n_gpus 4"]
    assert options(lambda config: config.lora.enabled) == ["--use_lora"]
    assert options(lambda config: config.fsdp.offload_policy) == ["fsdp=fsdp2_offload"]
    found = options(lambda config: config.data.token_budget <= 3 * 4096, "data.micro_batch_size_per_gpu=7")
    assert found == ["--micro_batch_size 3", "--max_length 1024"]
    found = options(lambda config: config.trainer.world_size >= 16, "data.train_batch_size=4")
    assert found == ["--n_gpus 8 --nnodes 2 --batch_size 16"]


def test_changes_are_combined_where_one_does_not_suffice():
    found = options(
        lambda config: config.lora.enabled and config.data.token_budget <= 2048, "data.micro_batch_size_per_gpu=2"
    )
    assert "--max_length 256 --use_lora" in found and not any(
        option in ("--use_lora", "--max_length 256") for option in found
    )


@pytest.mark.parametrize("on_gpus", [True, False])
def test_every_option_fits_as_it_is_written_and_none_may_exist(on_gpus):
    from sft_recipe.cli.flags import parse

    def fits(config):
        return config.data.token_budget * (1 if config.lora.enabled else 4) <= 4096

    found = options(fits, "data.micro_batch_size_per_gpu=4", on_gpus=on_gpus)
    assert found
    for option in found:
        line = parse(["--max_length", "4096", "--micro_batch_size", "4", *option.split()], {})
        values = dict(word.split("=", 1) for word in line.overrides)
        merged = load_config([f"{key}={value}" for key, value in values.items()])
        assert fits(merged), option
    assert options(lambda config: False, on_gpus=on_gpus) == []
    on_cpu = options(lambda config: config.fsdp.offload_policy or config.trainer.world_size > 1, on_gpus=False)
    assert on_cpu == []


def test_changed_leaves_the_rest_alone():
    config = load_config([])
    other = changed(config, {"data.max_length": 7, "lora.enabled": True})
    assert (other.data.max_length, other.lora.enabled) == (7, True)
    assert other.optim == config.optim and config.data.max_length != 7
