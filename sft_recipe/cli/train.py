"""What train.sh runs: flags and environment become Hydra overrides, and torchrun starts sft_recipe.main_sft with them.

A single rank needs no torchrun, whose imports would delay it by seconds: it is forked from this process.

Needs nothing but the standard library until a configuration is composed, so that --help works before the set-up.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sft_recipe import timing
from sft_recipe.engine.import_stubs import quick_imports
from sft_recipe.errors import ConfigError, RecipeError, is_debugging
from sft_recipe.launch.local import start_ranks, torchrun_args

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Flag:
    """A flag, the environment variable of the same name in capitals, and the key that both set."""

    name: str
    key: str
    default: str
    help: str
    short: str | None = None
    is_switch: bool = False
    many: bool = False

    @property
    def variable(self) -> str:
        return self.name.upper()


FLAGS = (
    Flag("model_path", "model.path", "Qwen/Qwen2.5-0.5B", "hub id, folder, .gguf, or SmolLM2-135M-Instruct", "model"),
    Flag("tokenizer_path", "model.tokenizer_path", "the model's", "where the tokenizer comes from"),
    Flag("train_data", "data.train_files", "./data/example_sft.json", "file, glob, or several of them", many=True),
    Flag("val_data", "data.val_files", "none", "the same, for validation; or data.val_ratio=0.05", many=True),
    Flag("max_length", "data.max_length", "2048", "longest example, tokens"),
    Flag("batch_size", "data.train_batch_size", "4", "examples per optimiser step, over all ranks"),
    Flag("micro_batch_size", "data.micro_batch_size_per_gpu", "1", "times MAX_LENGTH: tokens held in memory at once"),
    Flag("learning_rate", "optim.lr", "2e-5", "peak; with LoRA 2e-4 unless set", "lr"),
    Flag("num_epochs", "trainer.total_epochs", "3", "passes over the training data", "epochs"),
    Flag("warmup_ratio", "optim.lr_warmup_steps_ratio", "0.1", "share of all steps"),
    Flag("weight_decay", "optim.weight_decay", "0.01", "decoupled, as in AdamW"),
    Flag("grad_clip", "optim.clip_grad", "1.0", "largest global gradient norm"),
    Flag("n_gpus", "trainer.n_gpus_per_node", "1", "processes on this machine; without a GPU, CPU ranks"),
    Flag("strategy", "fsdp.strategy", "fsdp", "fsdp, fsdp2, megatron"),
    Flag("use_lora", "lora.enabled", "false", "train low-rank adapters", is_switch=True),
    Flag("lora_rank", "lora.rank", "8", "inner dimension of the adapters"),
    Flag("lora_alpha", "lora.alpha", "16", "the update is scaled by alpha / rank"),
    Flag("merge_lora", "lora.merge", "false", "save the merged model as well", is_switch=True),
    Flag("nnodes", "trainer.nnodes", "1", "machines"),
    Flag("node_rank", "trainer.node_rank", "0", "this machine's number"),
    Flag("master_addr", "trainer.master_addr", "localhost", "address of machine 0"),
    Flag("master_port", "trainer.master_port", "free", "its port; with several machines 29500 where not set"),
    Flag("output_dir", "trainer.output_dir", "./outputs", "run folder"),
    Flag("resume_from", "trainer.resume_from", "none", "a checkpoint, or auto: the newest whole one"),
    Flag("auto_restart", "trainer.auto_restart", "0", "restarts of a failed run, each from its newest checkpoint"),
    Flag("wandb_project", "trainer.wandb_project", "none", "set: log to wandb as well"),
)


@dataclass(frozen=True)
class CommandLine:
    """What a command line asks for; overrides stand in order of precedence, the strongest last."""

    overrides: list[str]
    config_args: list[str]
    dry_run: bool = False
    help: bool = False


def parse(args: list[str], environment: Mapping[str, str]) -> CommandLine:
    """Turn flags, then Hydra overrides, and the environment into overrides: override > flag > environment.

    Raises ConfigError: an unknown flag (with the nearest one), a flag without its value, a stray word.
    """
    by_name = {name: flag for flag in FLAGS for name in (flag.name, flag.short) if name}
    from_flags: dict[str, str] = {}
    from_user: list[str] = []
    config_args: list[str] = []
    switches = {"dry_run": False, "help": False}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "-h":
            word = "--help"
        if not word.startswith("-"):
            if not re.match(r"[+~]*[\w./@]+=", word):
                raise ConfigError(f"cannot read {word!r}: neither a flag (--epochs 3) nor an override (optim.lr=1e-5)")
            from_user.append(word)
            continue
        name, has_value, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if name in switches:
            switches[name] = True
        elif name in ("config_path", "config_name"):
            config_args.append(f"--{name.replace('_', '-')}={value if has_value else _value_of(word, rest)}")
        elif name in by_name:
            flag = by_name[name]
            from_flags[flag.key] = _override(flag, [value] if has_value else _values(flag, word, rest))
        else:
            raise ConfigError(f"unknown flag {word.partition('=')[0]}.{_nearest_flag(name, by_name)}")
    from_environment = [
        _override(flag, [environment[flag.variable]])
        for flag in FLAGS
        if environment.get(flag.variable) and flag.key not in from_flags
    ]
    return CommandLine([*from_environment, *from_flags.values(), *from_user], config_args, **switches)


def help_text() -> str:
    """Every flag with its default."""
    lines = [
        "usage: ./train.sh [FLAGS] [HYDRA OVERRIDES]",
        "",
        "Fine-tunes a language model on prompt/response, Alpaca or multi-turn data, with verl.",
        "Each flag is also an environment variable of the same name in capitals (BATCH_SIZE=8 ./train.sh).",
        "Precedence: override > flag > environment variable > config.yaml > conf/.",
        "",
        "flags:",
    ]
    for flag in FLAGS:
        names = f"--{flag.short}, --{flag.name}" if flag.short else f"--{flag.name}"
        lines.append(f"  {names:<26} {flag.help} (default: {flag.default}; {flag.key})")
    lines += [
        f"  {'--dry_run':<26} print the resolved configuration and the torchrun command, start nothing",
        f"  {'--config-path, --config-name':<26} another folder and name of config.yaml",
        f"  {'-h, --help':<26} this text",
        "",
        "overrides: any key of config.yaml and conf/, or a ready choice of a group:",
        "  ./train.sh --use_lora optim.lr_scheduler_type=linear lora=r16 fsdp=fsdp2",
        "",
        "SFT_DEBUG=1 shows the traceback of an error, SFT_TIMING=1 where the time to the first step goes.",
    ]
    return "\n".join(lines)


def main(args: list[str]) -> int:
    """Run a command line; returns the exit code: 0 done, 2 an error that the message explains, 75 stopped and saved."""
    try:
        line = parse(args, os.environ)
        if line.help:
            print(help_text())
            return 0
        return _launch(line)
    except RecipeError as error:
        if is_debugging():
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _launch(line: CommandLine) -> int:
    timing.mark("train.sh, its environment")
    with quick_imports():
        from sft_recipe.config.compose import load_config, parse_config_args, to_yaml

    config = load_config(line.overrides, **parse_config_args(line.config_args))
    arguments = torchrun_args(config.trainer, line.overrides, line.config_args)
    if line.dry_run:
        print(to_yaml(config))
        print("torchrun " + shlex.join(arguments))
        return 0
    return start_ranks(config.trainer, line.overrides, line.config_args)


def _values(flag: Flag, word: str, rest: list[str]) -> list[str]:
    if flag.is_switch:
        return [rest.pop(0)] if rest and rest[0].lower() in ("true", "false") else ["true"]
    values = [_value_of(word, rest)]
    while flag.many and rest and not rest[0].startswith("-") and "=" not in rest[0]:
        values.append(rest.pop(0))
    return values


def _value_of(word: str, rest: list[str]) -> str:
    if not rest or rest[0].startswith("--"):
        raise ConfigError(f"{word} needs a value")
    return rest.pop(0)


def _override(flag: Flag, values: list[str]) -> str:
    parts = [part for value in values for part in (value.split(",") if flag.many else [value]) if part]
    if not parts:
        raise ConfigError(f"--{flag.name} needs a value")
    if len(parts) == 1:
        return f"{flag.key}={_quote(parts[0])}"
    return f"{flag.key}=[{','.join(_quote(part, in_list=True) for part in parts)}]"


def _quote(value: str, in_list: bool = False) -> str:
    """A value as Hydra reads it back unchanged; `none`, as the help spells it, is null."""
    if value.lower() == "none":
        return "null"
    is_plain = re.fullmatch(r"[\w./+-]+(:[\w./+-]+)*", value, re.ASCII)
    # The type of a key tells text from numbers and truth values; in a list of texts only quotes do.
    is_other = re.fullmatch(r"[+-]?\.?\d.*|[+-]?(inf|nan)|true|false", value, re.IGNORECASE) if in_list else None
    if is_plain and not is_other:
        return value
    # OmegaConf reads ${...} as a reference; a backslash before it (after doubled ones, if any) makes it plain text.
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    # Hydra's grammar knows quotes and backslashes; a backslash counts only before a quote.
    return "'" + re.sub(r"(\\+)(?='|\Z)", r"\1\1", text).replace("'", "\\'") + "'"


def _nearest_flag(name: str, known: Mapping[str, Flag]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean --{close[0]}?" if close else " ./train.sh --help lists them."


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main(sys.argv[1:]))
