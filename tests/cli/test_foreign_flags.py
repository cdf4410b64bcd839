"""Flags of other projects set our keys, or end with one message that gives our name."""

from importlib import import_module

import pytest

from sft_recipe.cli.flags import FLAGS, parse
from sft_recipe.cli.foreign_flags import FILE_FLAGS, FOREIGN
from sft_recipe.config.compose import load_config
from sft_recipe.config.foreign_names import OPTIMIZERS, TORCH
from sft_recipe.config.validation import all_keys
from sft_recipe.errors import ConfigError
from tests.support.runs import ROOT


def overrides(*args):
    return parse(list(args), {}).overrides


def refused(*args):
    with pytest.raises(ConfigError) as caught:
        parse(list(args), {})
    return str(caught.value)


def test_flags_of_minimind_set_the_keys():
    args = "--data_path a.jsonl --max_seq_len 340 --learning_rate 1e-6 --epochs 2 --batch_size 16 --from_resume 1"
    config = load_config(
        overrides(*args.split(), "--save_dir=runs", "--save_weight", "full_sft", "--save_interval", "9")
    )
    assert (config.data.train_files, config.data.max_length, config.data.train_batch_size) == ("a.jsonl", 340, 16)
    assert (config.optim.lr, config.trainer.total_epochs, config.trainer.save_freq) == (1e-6, 2, 9)
    assert (config.trainer.resume_from, config.trainer.output_dir) == ("auto", "runs/full_sft")


@pytest.mark.parametrize(
    ("args", "same"),
    [
        ("--max-seq-len 9", "--max_length 9"),
        ("--data_path=a.json b.json", "--train_data a.json b.json"),
        ("--from_resume 0", ""),
        ("--save_dir x", "--output_dir x"),
        ("--save_weight x", "--output_dir out/x"),
        ("--is_keep_training=True --lr 5e-4", "--resume_from auto --lr 5e-4"),
        ("--is_keep_training False", ""),
        ("--model_name_or_path m --cutoff_len 9 --num_train_epochs 2.0", "--model m --max_length 9 --epochs 2.0"),
        ("--bf16 true --max_grad_norm 0.5", "--grad_clip 0.5 fsdp.mixed_precision.param_dtype=bf16"),
        ("--lr_scheduler_type linear", "optim.lr_scheduler_type=linear"),
        ("--use_compile 1", "fsdp.use_torch_compile=true"),
        ("--use_compile 0", ""),
        ("--torch_compile true", "fsdp.use_torch_compile=true"),
        ("--enable_liger_kernel true", "model.use_liger=true"),
        ("--use_liger_kernel true", "model.use_liger=true"),
        ("--log_interval 100", "trainer.log_freq=100"),
        ("--logging_steps 10", "trainer.log_freq=10"),
        ("--dataset_name a/b --use_peft --lora_r 4", "--train_data a/b --use_lora --lora_rank 4"),
        ("--adapter qlora", "--use_qlora"),
        ("--adapter lora --bits 16", "--use_lora"),
        ("--finetuning_type full", ""),
        ("--bits 4", "--use_qlora"),
        ("--quantization_bit=4", "--use_qlora"),
        ("--load_in_8bit false", ""),
        ("--optim adamw_torch_fused", ""),
        ("--optim adamw_8bit", "optim.optimizer=AdamW8bit optim.optimizer_impl=bitsandbytes.optim"),
        ("--optim paged_adamw_8bit", "optim.optimizer=PagedAdamW8bit optim.optimizer_impl=bitsandbytes.optim"),
    ],
)
def test_translated_command_line(args, same):
    assert sorted(overrides(*args.split())) == sorted(overrides(*same.split()))


@pytest.mark.parametrize("name", [name for name in FOREIGN if FOREIGN[name].hint])
def test_flag_without_an_equal_gives_our_name(name):
    message = refused(f"--{name}", "2")
    assert message.startswith(f"--{name} is a flag of {FOREIGN[name].project}; here: ")


def test_all_our_names_exist():
    flags, keys = {name: flag.key for flag in FLAGS for name in flag.names}, all_keys()
    for name, foreign in FOREIGN.items():
        assert not foreign.ours or foreign.ours in keys, name
        assert name not in flags or flags[name] == foreign.ours, name  # ours comes first, and is the same
        assert sum(map(bool, (foreign.ours, foreign.hint, foreign.when_on))) == 1, name


def test_eight_bits_are_refused_in_words():
    for args in (["--load_in_8bit"], ["--load_in_8bit", "True"], ["--bits", "8"], ["--quantization_bit", "8"]):
        assert "there is no base in 8 bits" in refused(*args)


def test_every_optimizer_of_the_table_exists():
    for name, (optimizer, implementation) in OPTIMIZERS.items():
        if implementation != TORCH:
            pytest.importorskip(implementation)
        assert hasattr(import_module(implementation), optimizer), name


def test_all_names_are_documented():
    text = (ROOT / "docs/configuration.md").read_text()
    ours = {name for flag in FLAGS for name in flag.names}
    assert [name for name in (*FOREIGN, *FILE_FLAGS) if f"`--{name}`" not in text and name not in ours] == []


def test_notice_names_both(capsys):
    overrides("--max_seq_len", "9", "--from_resume", "1")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "notice: --max_seq_len of MiniMind is --max_length here",
        "notice: --from_resume of MiniMind is --resume_from auto here",
    ]


@pytest.mark.parametrize("args", [["--max_seq_len"], ["--data_path="], ["--from_weight"], ["--save_dir", "--lr", "1"]])
def test_missing_value_is_an_error(args):
    assert "needs a value" in refused(*args)


# --from_weight


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def model_of(*args):
    [model] = [item for item in overrides(*args) if item.startswith("model.path=")]
    return model.removeprefix("model.path=")


def test_weight_is_found_by_its_name(out):
    for name in ("full_sft_512.pth", "full_sft_zh_512.pth", "full_sft_512_resume.pth"):
        (out / name).touch()
    assert model_of("--from_weight", "full_sft") == "out/full_sft_512.pth"


def test_sizes_choose_among_several_weights(out):
    for name in ("pretrain_512.pth", "pretrain_768.pth", "pretrain_768_moe.pth"):
        (out / name).touch()
    assert model_of("--from_weight", "pretrain", "--hidden_size", "512") == "out/pretrain_512.pth"
    assert model_of("--from_weight=pretrain", "--hidden_size=768", "--use_moe=1") == "out/pretrain_768_moe.pth"
    sizes = ["--hidden_size=768", "--use_moe=0", "--num_hidden_layers=8"]
    assert model_of("--from_weight=pretrain", *sizes) == "out/pretrain_768.pth"
    assert "may be any of out/pretrain_512.pth, out/pretrain_768.pth" in refused("--from_weight", "pretrain")


def test_run_is_used_where_there_is_no_file(out):
    for step in (9, 10):
        (out / f"full_sft/checkpoints/step_{step}/huggingface").mkdir(parents=True)
    assert model_of("--from_weight", "full_sft") == "out/full_sft/checkpoints/step_10/huggingface"


def test_missing_weight_is_an_error(out):
    assert "there is neither out/full_sft_*.pth nor a run in out/full_sft" in refused("--from_weight", "full_sft")
    assert "--model minimind:hidden_size=768" in refused("--from_weight", "none")
    assert "the sizes are read from the weights" in refused("--hidden_size", "512")
