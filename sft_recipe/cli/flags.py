"""The flags of train.sh and of the scripts that share them, and how a command line becomes Hydra overrides.

This module uses only the standard library, so that --help works before the first installation.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

from sft_recipe.cli.foreign_flags import translate
from sft_recipe.config.references import escape_references
from sft_recipe.errors import ConfigError, notify


@dataclass(frozen=True)
class Flag:
    """A flag, the environment variables of the same names in capitals, and the key that they set."""

    name: str
    key: str
    default: str
    help: str
    short: str | None = None
    is_switch: bool = False
    takes_several: bool = False

    @property
    def names(self) -> list[str]:
        """The names of the flag, the longer one last."""
        return [name for name in (self.short, self.name) if name]

    @property
    def variable(self) -> str:
        """The environment variable that does the same as the flag; the short name in capitals is one as well."""
        return self.name.upper()


FLAGS = (
    # begin: flags (written by scripts/generate_reference.py from sft_recipe/config/schema.py)
    Flag(
        "model_path",
        "model.path",
        "Qwen/Qwen2.5-0.5B",
        "hub id, folder, .gguf, .pth or .bin file, or SmolLM2-135M-Instruct (the embedded model)",
        short="model",
    ),
    Flag(
        "tokenizer_path", "model.tokenizer_path", "the model's", "hub id or folder of the tokenizer; null: the model's"
    ),
    Flag(
        "train_data",
        "data.train_files",
        "./data/example_sft.json",
        "file, glob, URL, hub data set (owner/name:config:split), or a list; a*0.5: half, a*2: twice, a#9: 9 examples",
        takes_several=True,
    ),
    Flag(
        "val_data",
        "data.val_files",
        "none",
        "validation data, written as train_files, or several named sets {zh: ..., en: ...}; null: none",
        takes_several=True,
    ),
    Flag("max_length", "data.max_length", "2048", "longest example, in tokens"),
    Flag(
        "max_target_length",
        "data.max_target_length",
        "max_length",
        "encoder-decoder models: longest answer, in tokens, while max_length bounds the source; null: max_length",
    ),
    Flag("batch_size", "data.train_batch_size", "4", "examples per optimizer step, over all ranks"),
    Flag(
        "micro_batch_size",
        "data.micro_batch_size_per_gpu",
        "1",
        "times max_length: the most tokens in one micro-batch; bounds memory",
    ),
    Flag("learning_rate", "optim.lr", "2e-5", "peak learning rate; 2e-4 with LoRA unless set", short="lr"),
    Flag(
        "warmup_ratio",
        "optim.lr_warmup_steps_ratio",
        "0.1",
        "fraction of all steps in which the learning rate rises from 0 to lr; not of onecycle",
    ),
    Flag("weight_decay", "optim.weight_decay", "0.01", "decoupled weight decay, as in AdamW"),
    Flag("grad_clip", "optim.clip_grad", "1.0", "maximum global gradient norm; 0 or null: no clipping"),
    Flag("strategy", "fsdp.strategy", "fsdp", "fsdp, fsdp2, megatron; QLoRA: fsdp2"),
    Flag(
        "use_lora", "lora.enabled", "false", "train low-rank adapters; the model's weights stay frozen", is_switch=True
    ),
    Flag("use_qlora", "lora.quantize", "false", "LoRA over weights in 4 bits (NF4, bitsandbytes)", is_switch=True),
    Flag("lora_rank", "lora.rank", "8", "inner dimension of the adapters"),
    Flag("lora_alpha", "lora.alpha", "16", "the update is scaled by alpha / rank"),
    Flag("merge_lora", "lora.merge", "false", "save the merged model as well as the adapter", is_switch=True),
    Flag(
        "recipe",
        "trainer.recipe",
        "none",
        "a recipe of conf/recipe (see --recipes) or a .yaml file, laid over config.yaml; null: none",
    ),
    Flag("num_epochs", "trainer.total_epochs", "3", "passes over the training data", short="epochs"),
    Flag("output_dir", "trainer.output_dir", "./outputs", "run folder: config.yaml, metrics.jsonl, checkpoints/step_N"),
    Flag(
        "resume_from",
        "trainer.resume_from",
        "none",
        "a checkpoint folder, or auto: the newest complete checkpoint in output_dir; null: a new run",
    ),
    Flag("auto_restart", "trainer.auto_restart", "0", "restarts of a failed run, each from its newest checkpoint"),
    Flag("wandb_project", "trainer.wandb_project", "none", "if set, log to wandb under this project as well"),
    Flag("n_gpus", "trainer.n_gpus_per_node", "1", "ranks on this machine; CPU ranks if there is no GPU"),
    Flag("nnodes", "trainer.nnodes", "1", "machines"),
    Flag("node_rank", "trainer.node_rank", "0", "this machine's number, from 0"),
    Flag("master_addr", "trainer.master_addr", "localhost", "address of machine 0"),
    Flag(
        "master_port",
        "trainer.master_port",
        "free",
        "port of machine 0; null: a free one on one machine, 29500 on several",
    ),
    # end: flags
)

OVERRIDE = "--hydra-override"  # hidden: marks an override for argparse
HIDDEN = "\0"  # in front of the value "--", which argparse would drop; no word of a command line has it
NEGATIVE_NUMBER = re.compile(r"-\.?\d[\d.]*(e[+-]?\d+)?", re.IGNORECASE)
LOOKS_LIKE_OVERRIDE = re.compile(r"[+~]*[\w./@]+=")
USAGE = "./train.sh [FLAGS] [HYDRA OVERRIDES]"
DESCRIPTION = """\
Fine-tunes a language model on prompt/response, Alpaca or multi-turn data, with verl.
A flag's name in capitals is also an environment variable (LR=1e-5 ./train.sh, LEARNING_RATE=1e-5 ./train.sh).
Precedence: override > flag > environment variable > recipe > config.yaml > conf/."""
EPILOG = """\
overrides: any key of config.yaml and conf/, or a file of a group in conf/:
  ./train.sh --use_lora optim.lr_scheduler_type=linear lora=r16 fsdp=fsdp2

SFT_DEBUG=1 shows the traceback of an error; SFT_TIMING=1 shows where the time to the first step goes."""


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line has overrides in order of precedence, the strongest last, and options of its command."""

    overrides: list[str]
    config_args: list[str]
    options: argparse.Namespace


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError with one message instead of printing its usage and exiting."""

    def __init__(self, usage: str, description: str, epilog: str = ""):
        super().__init__(
            usage=usage,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
        )
        self.register("action", None, _Store)  # of options that name no other action
        self.given: dict[str, str] = {}  # the name that was typed last, by the destination of its value

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; a message names a flag as it was typed."""
        self._typed = [word.partition("=")[0] for word in args]
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as argparse does. Raises ConfigError for an unknown flag, with the nearest one, or another word."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise ConfigError(self._explain_unknown(unknown[0]))
        return options

    def _explain_unknown(self, word: str) -> str:
        known = [option for action in self._actions for option in action.option_strings]
        if not word.startswith("-"):
            expected = "neither a flag (--epochs 3) nor an override (optim.lr=1e-5)" if OVERRIDE in known else "no flag"
            return f"cannot read {word!r}: it is {expected}"
        name = word.partition("=")[0]
        names = [option.lstrip("-") for option in known if option != OVERRIDE]
        close = difflib.get_close_matches(name.lstrip("-").lower(), names, n=1, cutoff=0.6)
        hint = f" Did you mean --{close[0]}?" if close else f" See {(self.usage or '').split()[0]} --help."
        return f"unknown flag {name}.{hint}"

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        problems = ("expected (?:one|at least one) argument", "needs a"), ("ignored explicit argument", "takes no")
        for pattern, problem in problems:
            if match := re.match(rf"argument (\S+): {pattern}", message):
                names = match[1].split("/")
                raise ConfigError(f"{next((name for name in self._typed if name in names), names[0])} {problem} value")
        raise ConfigError(message)


class _Store(argparse.Action):
    """Stores the last value of a flag, with a notice where it replaces another one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        earlier = parser.given.get(self.dest)
        if earlier and getattr(namespace, self.dest) != values:
            notify(f"{option_string} {values} replaces {earlier} {getattr(namespace, self.dest)}: the last one is used")
        parser.given[self.dest] = option_string
        setattr(namespace, self.dest, values)


def add_language(parser: Parser) -> None:
    """Add --lang, which beats the variable SFT_LANG; `chosen_language` checks its value."""
    parser.add_argument("--lang", metavar="en|zh", help="language of pages and findings (default: SFT_LANG, else en)")


def train_parser() -> Parser:
    """Return the parser of train.sh, without the flags that set keys: `parse` adds those."""
    parser = Parser(USAGE, DESCRIPTION, EPILOG)
    dry_run = "print the resolved configuration and the torchrun command, start nothing"
    parser.add_argument("--dry_run", action="store_true", help=dry_run)
    parser.add_argument(
        "--launcher", choices=("local", "ray", "slurm"), default="local",
        help="this machine, a Ray cluster, or a job of SLURM (--dry_run prints its script)",
    )  # fmt: skip
    parser.add_argument("--multirun", action="store_true", help="a sweep: optim.lr=1e-5,2e-5 is one run for each value")
    parser.add_argument("--recipes", action="store_true", help="list the recipes, start nothing")
    parser.add_argument("--check", action="store_true", help="check all that the run needs (check_sft_ready.py)")
    add_language(parser)
    return parser


def parse(
    args: Sequence[str], environment: Mapping[str, str], parser: Parser | None = None, shown: Sequence[Flag] = FLAGS
) -> CommandLine:
    """Turn flags, the environment and Hydra overrides, in any order, into overrides: override > flag > environment.

    `parser` has the further options of a command (by default train.sh's); its --help lists the flags `shown`.
    Prints the help and raises SystemExit for --help. Raises ConfigError for an unknown flag (with the nearest one), a
    flag without its value, or a word that is neither a flag nor an override.
    """
    parser = parser or train_parser()
    _add_flags(parser, shown)
    known = {option for action in parser._actions for option in action.option_strings}
    options = parser.parse_args(list(_mark_overrides(translate(args, known, FLAGS), parser)))
    values = vars(options)
    by_name = {flag.name: flag for flag in FLAGS}
    is_sweep = values.get("multirun", False)
    from_flags = {
        by_name[name].key: _override(by_name[name], parser.given.get(name, f"--{name}"), values[name], is_sweep)
        for name in values
        if name in by_name
    }
    from_environment = [
        override for flag in FLAGS if flag.key not in from_flags and (override := _from_environment(flag, environment))
    ]
    if empty := next((name for name in _CONFIG_ARGS if values.get(name) == ""), None):
        raise ConfigError(f"--{empty.replace('_', '-')} needs a value")
    config_args = [f"--{name.replace('_', '-')}={values[name]}" for name in values if name in _CONFIG_ARGS]
    return CommandLine([*from_environment, *from_flags.values(), *values.get("overrides", [])], config_args, options)


_CONFIG_ARGS = {"config_path": "DIR", "config_name": "NAME"}


def _add_flags(parser: Parser, shown: Sequence[Flag]) -> None:
    group = parser.add_argument_group("flags")
    for flag in FLAGS:
        names = [f"--{name}" for name in flag.names]
        text = f"{flag.help} (default: {flag.default}; {flag.key})".replace("%", "%%")
        help_text = text if flag in shown else argparse.SUPPRESS
        if flag.is_switch:
            group.add_argument(
                *names,
                dest=flag.name,
                nargs="?",
                const="true",
                type=_truth_value,
                metavar="true|false",
                default=argparse.SUPPRESS,
                help=help_text,
            )
        else:
            several: dict[str, Any] = {"action": "extend", "nargs": "+"} if flag.takes_several else {}
            metavar = flag.name.rpartition("_")[2].upper()
            group.add_argument(
                *names,
                dest=flag.name,
                metavar=metavar,
                default=argparse.SUPPRESS,
                help=help_text,
                **several,
            )
    where = {"config_path": "folder of another config.yaml", "config_name": "another name of config.yaml"}
    for name, metavar in _CONFIG_ARGS.items():
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, f"--{name}", dest=name, metavar=metavar, default=argparse.SUPPRESS, help=where[name])
    group.add_argument(OVERRIDE, dest="overrides", action="append", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _mark_overrides(args: Sequence[str], parser: Parser) -> Iterator[str]:
    """Make overrides an option, so that they end the values of a flag; write --batch-size as --batch_size.

    A word after a flag that needs a value is that value, even if it looks like an override. So is a path that exists
    among the values of a flag that takes several.
    """
    several = {name for action in parser._actions if action.nargs == "+" for name in action.option_strings}
    needs_value = {name for action in parser._actions if action.nargs in (None, "+") for name in action.option_strings}
    previous, takes_several = "", False
    for word in _join_negative_numbers(args, needs_value):
        if word.startswith("--") and previous not in needs_value:
            name, equals, value = word.partition("=")
            name = name[:2] + name[2:].replace("-", "_")
            word = name + equals + (HIDDEN + value if value == "--" else value)
            takes_several = name in several
        elif LOOKS_LIKE_OVERRIDE.match(word) and previous not in needs_value and not (takes_several and _exists(word)):
            word, takes_several = f"{OVERRIDE}={word}", False
        previous = word
        yield word


def _join_negative_numbers(args: Sequence[str], needs_value: Collection[str]) -> Iterator[str]:
    """Write `--lr -1e-5` as `--lr=-1e-5`: argparse takes a negative number with an exponent for a flag."""
    words = iter(args)
    for word in words:
        name = word.replace("-", "_").replace("__", "--", 1)
        if name in needs_value and (value := next(words, None)) is not None:
            if NEGATIVE_NUMBER.fullmatch(value):
                yield f"{word}={value}"
                continue
            yield from (word, value)
        else:
            yield word


def _truth_value(text: str) -> str:
    if text.lower() not in ("true", "false", "yes", "no", "on", "off", "1", "0", ""):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text


def _from_environment(flag: Flag, environment: Mapping[str, str]) -> str | None:
    """Return the override of a flag's variables. Raises ConfigError if they have different values."""
    given = {name: environment[name] for name in map(str.upper, flag.names) if environment.get(name, "").strip()}
    if len(set(given.values())) > 1:
        both = " and ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(f"the environment variables {both} set the same key; keep one of them")
    return next((_override(flag, name, value) for name, value in given.items()), None)


def _override(flag: Flag, source: str, value: str | list[str], is_sweep: bool = False) -> str:
    """Return the override that sets a flag's key; several values may also be separated by commas, in brackets or not.

    In a sweep several values of a flag that takes one are those of its runs. Raises ConfigError if `source`, the flag
    or variable, has no value.
    """
    values = value if isinstance(value, list) else [value]
    if flag.takes_several:
        values = list(chain.from_iterable(map(_split, values)))
    values = [text.removeprefix(HIDDEN) for text in values if text]
    if not values:
        raise ConfigError(f"{source} needs a value")
    if len(values) == 1:
        runs = values[0].split(",") if is_sweep and not flag.takes_several else values
        return f"{flag.key}={','.join(map(quote, runs))}"
    return f"{flag.key}=[{','.join(quote(text, in_list=True) for text in values)}]"


def _split(text: str) -> list[str]:
    """Split a.json,b.json; a list as in an override, [a.json, 'b.json'], has brackets, spaces and quotes as well.

    A path that exists is not split.
    """
    if _exists(text):
        return [text]
    if not re.fullmatch(r"\[[^\[\]]*\]", text):
        return text.split(",")
    return [re.sub(r"^(['\"])(.*)\1$", r"\2", part.strip()) for part in text[1:-1].split(",")]


def _exists(text: str) -> bool:
    """Return whether a text, without a share such as *0.5 or #1000 at its end, is a path that exists."""
    return any(os.path.exists(os.path.expanduser(path)) for path in (text, re.sub(r"(\*[\d.]+|#\d+)$", "", text)))


def quote(value: str, in_list: bool = False) -> str:
    """Return a value as Hydra reads it back unchanged; `none` becomes null."""
    if value.lower() == "none":
        return "null"
    is_plain = re.fullmatch(r"[\w./+-]+(:[\w./+-]+)*", value, re.ASCII)
    # The type of a key separates text from numbers and truth values; in a list of texts only quotes do.
    is_other_type = re.fullmatch(r"[+-]?\.?\d.*|[+-]?(inf|nan)|true|false", value, re.IGNORECASE) if in_list else None
    if is_plain and not is_other_type:
        return value
    text = escape_references(value)
    # Hydra's grammar has quotes and backslashes; a backslash is special only before a quote.
    return "'" + re.sub(r"(\\+)(?='|\Z)", r"\1\1", text).replace("'", "\\'") + "'"
