"""The flags of other projects: translated where ours means the same, else an error that gives our name.

This module uses only the standard library, so that --help works before the first installation.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sft_recipe.config.foreign_names import LLAMAFACTORY, OPTIMIZERS, TRAINING_ARGUMENTS, optimizer_overrides
from sft_recipe.errors import ConfigError, notify

if TYPE_CHECKING:
    from sft_recipe.cli.flags import Flag

ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class Foreign(NamedTuple):
    """A flag of another project: `ours` is the key that gets its value, and `hint` what to do without one.

    A `when_on` is what the flag means where it is on; off, it means nothing. `values` are the meanings of those values
    that have one; for others there is the hint.
    """

    project: str
    ours: str = ""
    hint: str = ""
    when_on: tuple[str, ...] = ()
    values: Mapping[str, tuple[str, ...]] = {}


MINIMIND, CHATLM, FACTORY, TRL, AXOLOTL = "MiniMind", "ChatLM-mini-Chinese", "LLaMA-Factory", "TRL", "axolotl"
BATCH = "--batch_size is batch size x accumulation x GPUs, the examples of a step; --micro_batch_size bounds memory"
SIZES = "the sizes are read from the weights; random weights: --model minimind:hidden_size=512,num_hidden_layers=8"
ADAPTERS = "--use_lora or --use_qlora trains adapters; without them all weights are trained"
FOUR_BITS = "--use_qlora keeps the base model in 4 bits; there is no base in 8 bits"
OPTIMIZER = "optim.optimizer and optim.optimizer_impl choose one of torch.optim or another library"
FOREIGN = {
    **{name: Foreign(f"{FACTORY} and {TRL}", key) for name, key in TRAINING_ARGUMENTS.items()},
    **{name: Foreign(FACTORY, key) for name, key in LLAMAFACTORY.items()},
    "data_path": Foreign(MINIMIND, "data.train_files"),
    "max_seq_len": Foreign(MINIMIND, "data.max_length"),
    "from_resume": Foreign(MINIMIND, when_on=("--resume_from", "auto")),
    "save_interval": Foreign(MINIMIND, "trainer.save_freq"),
    "accumulation_steps": Foreign(MINIMIND, hint=BATCH),
    "hidden_size": Foreign(MINIMIND, hint=SIZES),
    "num_hidden_layers": Foreign(MINIMIND, hint=SIZES),
    "use_moe": Foreign(MINIMIND, hint=SIZES),
    "use_wandb": Foreign(MINIMIND, hint="--wandb_project NAME logs to wandb"),
    "use_compile": Foreign(MINIMIND, when_on=("fsdp.use_torch_compile=true",)),
    "log_interval": Foreign(MINIMIND, "trainer.log_freq"),
    "dtype": Foreign(MINIMIND, hint="fsdp.mixed_precision.param_dtype=bf16 or fp32"),
    "device": Foreign(MINIMIND, hint="trainer.device=cpu or cuda"),
    "seed": Foreign(MINIMIND, "trainer.seed"),
    "num_workers": Foreign(MINIMIND, "data.num_workers"),
    "learn_rate": Foreign(CHATLM, hint="its peak is learn_rate x div_factor, and --lr is the peak: give the product"),
    "is_keep_training": Foreign(CHATLM, when_on=("--resume_from", "auto")),
    "is_finetune": Foreign(CHATLM, hint="leave it out: every run fine-tunes --model; --recipe chatlm has its settings"),
    "use_small_config": Foreign(CHATLM, hint="--recipe chatlm_small"),
    "batch_size_per_gpu": Foreign(CHATLM, hint=BATCH),
    "dataset": Foreign(FACTORY, "data.train_files"),
    "eval_dataset": Foreign(FACTORY, "data.val_files"),
    "val_size": Foreign(FACTORY, "data.val_ratio"),
    "max_steps": Foreign(FACTORY, "trainer.total_training_steps"),
    "per_device_train_batch_size": Foreign(FACTORY, hint=BATCH),
    "gradient_accumulation_steps": Foreign(FACTORY, hint=BATCH),
    "warmup_steps": Foreign(FACTORY, "optim.lr_warmup_steps"),
    "save_steps": Foreign(FACTORY, "trainer.save_freq"),
    "eval_steps": Foreign(FACTORY, "trainer.test_freq"),
    "resume_from_checkpoint": Foreign(FACTORY, "trainer.resume_from"),
    "finetuning_type": Foreign(FACTORY, hint=ADAPTERS, values={"lora": ("--use_lora",), "full": ()}),
    "lora_target": Foreign(FACTORY, hint="lora.target_modules=[q_proj,v_proj], or all-linear"),
    "template": Foreign(FACTORY, hint="leave it out: the model's own chat template is used; model.chat_template=FILE"),
    "stage": Foreign(FACTORY, hint="leave it out: this program does supervised fine-tuning alone"),
    "do_train": Foreign(FACTORY, hint="leave it out: ./train.sh trains"),
    "bf16": Foreign(FACTORY, when_on=("fsdp.mixed_precision.param_dtype=bf16",)),
    "deepspeed": Foreign(FACTORY, hint="--strategy fsdp2, with fsdp.offload_policy=true to offload"),
    "report_to": Foreign(FACTORY, hint="trainer.logger=[console,tensorboard]"),
    "dataset_name": Foreign(TRL, "data.train_files"),
    "max_seq_length": Foreign(TRL, "data.max_length"),
    "optim": Foreign(
        f"{FACTORY} and {TRL}", hint=OPTIMIZER, values={name: optimizer_overrides(name) for name in OPTIMIZERS}
    ),
    "quantization_bit": Foreign(FACTORY, hint=FOUR_BITS, values={"4": ("--use_qlora",)}),
    "bits": Foreign("QLoRA", hint=FOUR_BITS, values={"4": ("--use_qlora",), "16": ()}),
    "load_in_4bit": Foreign(f"{TRL} and {AXOLOTL}", when_on=("--use_qlora",)),
    "load_in_8bit": Foreign(f"{TRL} and {AXOLOTL}", hint=FOUR_BITS, values=dict.fromkeys(OFF, ())),
    "adapter": Foreign(
        AXOLOTL,
        hint=ADAPTERS,
        values={"lora": ("--use_lora",), "qlora": ("--use_qlora",)},
    ),
    "use_peft": Foreign(TRL, when_on=("--use_lora",)),
    "lora_r": Foreign(TRL, "lora.rank"),
    "lora_target_modules": Foreign(TRL, hint="lora.target_modules=[q_proj,v_proj], or all-linear"),
    "packing": Foreign(TRL, hint="leave it out: documents are always packed, without attention between them"),
    "assistant_only_loss": Foreign(TRL, hint="leave it out: the loss is on the assistant's turns alone"),
}
# MiniMind's names of files: out/full_sft_768.pth is folder, weight and size.
FILE_FLAGS = ("from_weight", "save_weight", "save_dir")


def translate(words: Sequence[str], known: Collection[str], flags: Collection[Flag]) -> list[str]:
    """Return a command line with our flags and overrides in place of those of other projects.

    `known` are the options of the command, which come first, and `flags` those that set keys. Raises ConfigError, with
    our name, for a flag that has no equal here.
    """
    result: list[str] = []
    files: dict[str, str] = {}
    parsed = list(_flags(words))
    chooses_file = any(name == "from_weight" for name, _, _ in parsed)
    for name, value, original in parsed:
        if name in FILE_FLAGS or (chooses_file and FOREIGN.get(name, Foreign("")).hint == SIZES):
            files[name] = _required(name, value)
        elif name in FOREIGN and f"--{name}" not in known:
            result += _translated(name, value, {flag.key: f"--{flag.name}" for flag in flags})
        else:
            result += original
    return result + list(_file_flags(files))


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str | None, list[str]]]:
    """Yield name, value and words of each flag; other words have the name ""."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if name not in FOREIGN and name not in FILE_FLAGS:
            yield "", None, [word]
        elif equals:
            yield name, value, [word]
        elif rest and not rest[0].startswith("--"):
            yield name, rest[0], [word, rest.pop(0)]
        else:
            yield name, None, [word]


def _translated(name: str, value: str | None, flags: Mapping[str, str]) -> list[str]:
    foreign = FOREIGN[name]
    if (meaning := foreign.values.get((value or "true").lower())) is not None:
        notify(f"--{name} {value} of {foreign.project} is {' '.join(meaning) or 'the default'} here")
        return [*meaning]
    if foreign.hint:
        raise ConfigError(f"--{name} is a flag of {foreign.project}; here: {foreign.hint}")
    if foreign.when_on:
        meaning = foreign.when_on if (value or "true").lower() in ON else ()
        notify(f"--{name} of {foreign.project} is {' '.join(foreign.when_on)} here")
        return [*meaning]
    value, flag = _required(name, value), flags.get(foreign.ours)
    notify(f"--{name} of {foreign.project} is {flag or foreign.ours} here")
    return [flag, value] if flag else [f"{foreign.ours}={value}"]


def _required(name: str, value: str | None) -> str:
    if not value:
        raise ConfigError(f"--{name} needs a value")
    return value


def _file_flags(files: dict[str, str]) -> Iterator[str]:
    """Translate MiniMind's names of files: a run of ours is a folder of the name that its file would have."""
    folder = files.get("save_dir", "out")
    if "save_dir" in files or "save_weight" in files:
        output = f"{folder}/{files['save_weight']}" if "save_weight" in files else folder
        notify(f"--save_dir and --save_weight of {MINIMIND} are --output_dir here: {output}")
        yield from ("--output_dir", output)
    if "from_weight" in files:
        model = _find_weight(folder, files)
        notify(f"--from_weight of {MINIMIND} is --model here: {model}")
        yield from ("--model", model)


def _find_weight(folder: str, files: dict[str, str]) -> str:
    """Return the file `<folder>/<name>_<size>.pth`, else the newest model of the run `<folder>/<name>`."""
    name, size = files["from_weight"], files.get("hidden_size", "*")
    if name == "none":
        raise ConfigError("--from_weight none starts from random weights; here: --model minimind:hidden_size=768")
    found = [
        path for path in Path(folder).glob(f"{name}_*.pth") if re.fullmatch(r"\d+(_moe)?", path.stem[len(name) + 1 :])
    ]
    if size != "*":
        found = [path for path in found if path.stem.removeprefix(f"{name}_").removesuffix("_moe") == size]
    if "use_moe" in files:
        found = [path for path in found if path.stem.endswith("_moe") == (files["use_moe"].lower() in ON)]
    if len(found) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise ConfigError(f"--from_weight {name} may be any of {names}; name one with --model")
    if found:
        return str(found[0])
    steps = {int(path.parent.name[5:]): path for path in Path(folder, name).glob("checkpoints/step_*/huggingface")}
    if not steps:
        raise ConfigError(
            f"--from_weight {name}: there is neither {folder}/{name}_{size}.pth nor a run in {folder}/{name}; name the "
            "file or folder with --model"
        )
    return str(steps[max(steps)])
