"""Configurations of other projects become the overrides that a reader of both documentations would write."""

import json

import pytest

from sft_recipe.cli import import_config as command
from sft_recipe.config.compose import load_config
from sft_recipe.config.importing.source import import_config
from sft_recipe.errors import ConfigError

INFO = {
    "faq": {"file_name": "faq.json", "columns": {"prompt": "question", "response": "answer"}},
    "support": {
        "hf_hub_url": "acme/support",
        "subset": "en",
        "split": "fit",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "tools": "tools"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "Client", "assistant_tag": "gpt"},
        "num_samples": 500,
    },
    "photos": {"file_name": "photos.json", "columns": {"images": "pictures"}},
    "elsewhere": {"ms_hub_url": "acme/other"},
}
LLAMA_FACTORY = {
    "model_name_or_path": "acme/base",
    "stage": "sft",
    "finetuning_type": "lora",
    "lora_rank": 16,
    "lora_target": "q_proj,v_proj",
    "dataset": "faq, support",
    "template": "qwen",
    "cutoff_len": 4096,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1.0e-4,
    "num_train_epochs": 2.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "bf16": True,
    "val_size": 0.1,
    "save_steps": 200,
    "eval_strategy": "epoch",
    "mask_history": True,
    "logging_steps": 10,
    "neftune_noise_alpha": 5,
    "report_to": "wandb",
}
AXOLOTL = {
    "base_model": "acme/base",
    "datasets": [
        {
            "path": "acme/chats",
            "name": "en",
            "split": "fit",
            "type": "chat_template",
            "field_messages": "dialog",
            "message_property_mappings": {"role": "who", "content": "says"},
            "roles": {"user": ["Client"], "assistant": ["assistant", "Agent"]},
        },
        {"path": "json", "data_files": "more.jsonl", "type": "alpaca"},
    ],
    "val_set_size": 0.02,
    "adapter": "qlora",
    "load_in_4bit": True,
    "lora_r": 32,
    "lora_alpha": 64,
    "lora_target_linear": True,
    "sequence_len": 8192,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "linear",
    "learning_rate": 0.0002,
    "num_epochs": 4,
    "warmup_steps": 10,
    "saves_per_epoch": 1,
    "evals_per_epoch": 4,
    "fsdp_version": 2,
    "fsdp_config": {"offload_params": True},
    "adam_beta2": 0.95,
    "chat_template": "chatml",
}
TRL = """#!/bin/bash
MODEL=acme/base
export OUT=${OUT:-runs/trl}
# trl sft --model_name_or_path old/model
trl sft \\
    --model_name_or_path $MODEL --dataset_name acme/chats --dataset_config en --eval_strategy steps --eval_steps 50 \\
    --learning_rate 2.0e-4 --per_device_train_batch_size 2 --gradient_accumulation_steps=8 --packing \\
    --use_peft --lora_r 32 --lora_target_modules q_proj v_proj --assistant_only_loss --output_dir "$OUT" --max_steps 100
"""
VERL = """nproc=$1
HERE=/data
torchrun --nnodes=1 --nproc_per_node=$nproc -m verl.trainer.fsdp_sft_trainer \\
    data.train_files=$HERE/a.parquet data.prompt_key=question +data.response_key=answer data.micro_batch_size=8 \\
    model.partial_pretrain=acme/base model.lora_rank=8 model.target_modules=[q_proj,v_proj] optim.lr=1e-4 \\
    model.strategy=fsdp2 trainer.default_local_dir=out trainer.logger=console ulysses_sequence_parallel_size=2 \\
    model.external_lib=acme use_remove_padding=true $@
"""


def write(tmp_path, content, name="run.yaml"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(INFO))
    return path


def imported(tmp_path, content, gpus=None, name="run.yaml"):
    project, result = import_config(write(tmp_path, content, name), gpus)
    return project, result.values, [line.partition(":")[0] for line in result.unmapped]


def test_llama_factory(tmp_path):
    project, values, unmapped = imported(tmp_path, LLAMA_FACTORY, gpus=2)
    assert project == "LLaMA-Factory"
    assert values == {
        "model.path": "acme/base",
        "lora.enabled": True,
        "lora.rank": 16,
        "lora.alpha": 32,
        "lora.target_modules": ["q_proj", "v_proj"],
        "data.train_files": [f"{tmp_path}/data/faq.json", "acme/support:en:fit#500"],
        "data.columns": {
            "instruction": "question",
            "output": "answer",
            "conversations": "talk",
            "role": "who",
            "content": "says",
        },
        "data.roles": {"Client": "user"},
        "data.max_length": 4096,
        "data.truncation": "right",
        "data.train_on": "last",
        "data.val_ratio": 0.1,
        "data.micro_batch_size_per_gpu": 2,
        "data.train_batch_size": 2 * 4 * 2,
        "optim.lr": 1e-4,
        "optim.lr_scheduler_type": "cosine",
        "optim.lr_warmup_steps_ratio": 0.05,
        "optim.weight_decay": 0.0,
        "optim.clip_grad": 1.0,
        "fsdp.mixed_precision.param_dtype": "bf16",
        "trainer.n_gpus_per_node": 2,
        "trainer.total_epochs": 2.0,
        "trainer.save_freq": 200,
        "trainer.log_freq": 10,
        "trainer.test_freq": "after_each_epoch",
        "trainer.logger": ["console", "wandb"],
    }
    assert unmapped == ["template", "neftune_noise_alpha"]


def test_axolotl(tmp_path):
    project, values, unmapped = imported(tmp_path, AXOLOTL)
    assert project == "axolotl"
    assert values == {
        "model.path": "acme/base",
        "lora.enabled": True,
        "lora.quantize": True,
        "lora.rank": 32,
        "lora.alpha": 64,
        "data.train_files": ["acme/chats:en:fit", "more.jsonl"],
        "data.columns": {"conversations": "dialog", "role": "who", "content": "says"},
        "data.roles": {"Client": "user", "Agent": "assistant"},
        "data.max_length": 8192,
        "data.val_ratio": 0.02,
        "data.micro_batch_size_per_gpu": 1,
        "data.train_batch_size": 2,
        "optim.lr": 0.0002,
        "optim.lr_scheduler_type": "linear",
        "optim.lr_warmup_steps": 10,
        "optim.weight_decay": 0.0,
        "optim.clip_grad": 1.0,
        "optim.betas": [0.9, 0.95],
        "fsdp.strategy": "fsdp2",
        "fsdp.offload_policy": True,
        "trainer.n_gpus_per_node": 1,
        "trainer.total_epochs": 4,
        "trainer.save_freq": "after_each_epoch",
    }
    assert unmapped == ["evals_per_epoch", "chat_template", "dataset json, type", "optim.optimizer"]


def test_trl_command_in_a_script(tmp_path, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    project, values, unmapped = imported(tmp_path, TRL, name="run.sh")
    assert project == "TRL"
    assert values["model.path"] == "acme/base" and values["trainer.output_dir"] == "runs/trl"
    assert values["data.train_files"] == "acme/chats:en:train" and values["data.val_files"] == "acme/chats:en:test"
    assert (values["lora.rank"], values["lora.alpha"]) == (32, 32)
    assert values["lora.target_modules"] == ["q_proj", "v_proj"]
    assert (values["optim.lr"], values["data.train_batch_size"], values["data.max_length"]) == (2e-4, 16, 1024)
    assert (values["trainer.total_training_steps"], values["trainer.test_freq"]) == (100, 50)
    assert unmapped == ["packing", "lora_dropout"]


def test_verl_command_in_a_script(tmp_path):
    project, values, unmapped = imported(tmp_path, VERL, name="run.sh")
    assert project == "verl"
    assert {key: values[key] for key in ("model.path", "data.train_files", "data.columns", "lora.rank")} == {
        "model.path": "acme/base",
        "data.train_files": "/data/a.parquet",
        "data.columns": {"prompt": "question", "response": "answer"},
        "lora.rank": 8,
    }
    assert values["lora.target_modules"] == ["q_proj", "v_proj"] and values["trainer.logger"] == ["console"]
    assert (values["fsdp.strategy"], values["fsdp.ulysses_sequence_parallel_size"]) == ("fsdp2", 2)
    assert (values["optim.lr"], values["data.train_batch_size"], values["trainer.nnodes"]) == (1e-4, 256, 1)
    assert unmapped == ["--nproc_per_node", "model.external_lib"]


@pytest.mark.parametrize(
    ("content", "name"), [(LLAMA_FACTORY, "a.yaml"), (AXOLOTL, "a.yml"), (TRL, "a.sh"), (VERL, "a.sh")]
)
def test_the_printed_command_line_is_valid(tmp_path, capsys, content, name):
    import shlex

    assert command.main([str(write(tmp_path, content, name)), "--gpus", "2"]) == 0
    script, _, listed = capsys.readouterr().out.partition("# Not mapped:")
    words = shlex.split(script.replace("\\\n", " "), comments=True)
    _, result = import_config(tmp_path / name, 2)
    config = load_config(words[1:])
    for key, value in result.values.items():
        found = config
        for part in key.split("."):
            found = getattr(found, part)
        assert (list(found) if isinstance(found, tuple) else found) == value, key
    assert len(listed.strip().splitlines()) == len(result.unmapped)


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        ({**LLAMA_FACTORY, "stage": "dpo"}, "a.yaml", "stage is dpo; only sft is supervised fine-tuning"),
        ({**LLAMA_FACTORY, "dataset": "nothing"}, "a.yaml", "the data set nothing is not in"),
        ({**LLAMA_FACTORY, "dataset_dir": "nowhere"}, "a.yaml", "there is no nowhere/dataset_info.json"),
        ({**AXOLOTL, "rl": "kto"}, "a.yaml", "rl is kto; only supervised fine-tuning"),
        ("a: [", "a.yaml", "not valid YAML"),
        ("- a\n- b\n", "a.yaml", "unknown configuration; expected a YAML of LLaMA-Factory"),
        ({"learning_rate": 1}, "a.yaml", "unknown configuration"),
        ("echo hello\n", "a.sh", "unknown configuration"),
        ("trl sft --model_name_or_path 'open\n", "a.sh", "unknown configuration"),
    ],
)
def test_what_cannot_be_imported_is_one_message(tmp_path, capsys, content, name, expected):
    assert command.main([str(write(tmp_path, content, name))]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and expected in output.err and not output.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpus", "0"], "--gpus is 0"),
        ([], "required: FILE"),
        (["missing.yaml"], "missing.yaml cannot be read"),
        ([""], "FILE is empty; it must be the name of a file"),
    ],
)
def test_wrong_arguments_are_one_message(tmp_path, capsys, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    file = [str(write(tmp_path, AXOLOTL))] if "--gpus" in arguments else []
    assert command.main([*file, *arguments]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"dataset": "photos"}, "dataset photos"),
        ({"dataset": "elsewhere"}, "dataset elsewhere"),
        ({"finetuning_type": "freeze"}, "finetuning_type"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type"),
        ({"val_size": 200}, "val_size"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"max_samples": 1000}, "max_samples"),
        ({"deepspeed": "z3.json"}, "deepspeed"),
        ({"gradient_accumulation_steps": "auto"}, "per_device_train_batch_size"),
        ({"optim": "lion"}, "optim"),
    ],
)
def test_a_setting_without_counterpart_is_listed(tmp_path, settings, name):
    assert name in imported(tmp_path, {**LLAMA_FACTORY, **settings})[2]


def test_fp16_is_mapped(tmp_path):
    assert imported(tmp_path, {**LLAMA_FACTORY, "fp16": True})[1]["fsdp.mixed_precision.param_dtype"] == "fp16"


@pytest.mark.parametrize(
    ("content", "name", "setting", "expected"),
    [
        (AXOLOTL, "a.yaml", {"sample_packing": True}, "a batch counts packed sequences, here examples"),
        (TRL.replace("--packing", "--packing true"), "a.sh", {"packing": True}, "a batch counts packed sequences"),
        (LLAMA_FACTORY, "a.yaml", {"neat_packing": True}, "a batch counts packed sequences, here examples"),
        (LLAMA_FACTORY, "a.yaml", {"push_to_hub": True}, "scripts/export_model.py --push_to_hub uploads the model"),
        (AXOLOTL, "a.yaml", {"hub_model_id": "a/b"}, "scripts/export_model.py --push_to_hub uploads the model"),
    ],
)
def test_what_to_know_of_a_setting_is_listed(tmp_path, content, name, setting, expected):
    content = content if isinstance(content, str) else {**content, **setting}
    [(key, value)] = setting.items()
    [line] = [line for line in import_config(write(tmp_path, content, name))[1].unmapped if line.startswith(key)]
    assert line.startswith(f"{key}: {value} (") and expected in line
    off = {**LLAMA_FACTORY, **dict.fromkeys(setting, False)}
    assert key not in imported(tmp_path, off)[2]


@pytest.mark.parametrize(
    ("gpus", "settings", "expected"),
    [
        (1, {}, "AdamW8bit"),
        (2, {}, None),
        (1, {"fsdp_version": 2}, None),
        (2, {"optimizer": "adamw_8bit"}, None),
        (2, {"optimizer": "sgd"}, "SGD"),
    ],
)
def test_an_optimizer_that_the_run_refuses_is_replaced(tmp_path, gpus, settings, expected):
    content = {**AXOLOTL, "fsdp_version": None, "fsdp_config": None, **settings}
    _, values, unmapped = imported(tmp_path, content, gpus)
    assert values.get("optim.optimizer") == expected and ("optim.optimizer" in unmapped) is (expected is None)
    assert ("optim.optimizer_impl" in values) is (expected == "AdamW8bit")


VERL_YAML = {
    "data": {"train_files": "a.parquet"},
    "model": {"partial_pretrain": "acme/base"},
    "trainer": {"n_gpus_per_node": 8, "experiment_name": "first"},
}


@pytest.mark.parametrize(("gpus", "expected", "listed"), [(None, 8, []), (8, 8, []), (2, 2, ["--gpus 2 replaces it"])])
def test_the_flag_replaces_the_gpus_of_verl(tmp_path, gpus, expected, listed):
    _, result = import_config(write(tmp_path, VERL_YAML), gpus)
    assert result.values["trainer.n_gpus_per_node"] == expected and result.values["trainer.run_name"] == "first"
    assert result.unmapped == [f"trainer.n_gpus_per_node: 8 ({reason})" for reason in listed]


@pytest.mark.parametrize(
    ("content", "name", "settings", "expected"),
    [
        (LLAMA_FACTORY, "a.yaml", {"enable_liger_kernel": True}, (True, False)),
        (LLAMA_FACTORY, "a.yaml", {"torch_compile": True}, (False, True)),
        (AXOLOTL, "a.yaml", {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_rope": True}, (True, False)),
        (AXOLOTL, "a.yaml", {"liger_fused_linear_cross_entropy": True}, (False, False)),
        (AXOLOTL, "a.yaml", {"torch_compile": True}, (False, True)),
        (TRL, "a.sh", " --use_liger_kernel true", (True, False)),
        (VERL, "a.sh", " model.use_liger=True", (True, False)),
        (VERL, "a.sh", " engine.use_torch_compile=True", (False, False)),  # of an entropy
    ],
)
def test_liger_and_torch_compile_are_mapped(tmp_path, content, name, settings, expected):
    unmapped = imported(tmp_path, content, name)[2]
    content = content.rstrip("\n") + settings + "\n" if isinstance(content, str) else {**content, **settings}
    _, values, unmapped_now = imported(tmp_path, content, name)
    assert (values.get("model.use_liger", False), values.get("fsdp.use_torch_compile", False)) == expected
    assert unmapped_now == unmapped


def test_of_liger_and_torch_compile_one_is_mapped(tmp_path):
    both = {**LLAMA_FACTORY, "enable_liger_kernel": True, "torch_compile": True}
    _, values, unmapped = imported(tmp_path, both)
    assert values["model.use_liger"] is True and "fsdp.use_torch_compile" not in values and "torch_compile" in unmapped


def test_files_with_different_columns_are_listed(tmp_path):
    other = {"path": "b.json", "type": "chat_template", "field_messages": "other"}
    _, values, unmapped = imported(tmp_path, {**AXOLOTL, "datasets": [AXOLOTL["datasets"][0], other]})
    assert values["data.columns"]["conversations"] == "dialog" and "columns of b.json" in unmapped


def test_an_unreadable_file_is_an_error(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        import_config(tmp_path / "a.yaml")
