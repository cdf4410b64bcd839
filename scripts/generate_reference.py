#!/usr/bin/env python3
"""Write every place that repeats a key's default or meaning from sft_recipe/config/schema.py, where both are defined.

These are conf/<group>/default.yaml, the trainer section of config.yaml, the flags in sft_recipe/cli/flags.py, the
flag table of README.md, docs/reference/configuration.md, conf/config.schema.json and scripts/completion.bash. With
--check nothing is written; the exit code is 1 if one of them differs.
"""

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))

from sft_recipe.errors import packages_required  # noqa: E402

with packages_required():
    import yaml
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo
    from pydantic_core import to_jsonable_python

    from sft_recipe.config.json_schema import config_schema
    from sft_recipe.config.schema import Config
    from sft_recipe.config.validation import fields, flag_names

COMMENT_COLUMN = 34
LINE_LENGTH = 120
HEADINGS = {
    "model": "The model, its tokenizer, attention and activations.",
    "data": "The training data, its supervised tokens and its batches.",
    "optim": "The optimizer and the learning-rate schedule.",
    "fsdp": "How the model is distributed over ranks, and its precision.",
    "lora": "Low-rank adapters instead of full fine-tuning.",
    "eval": "What is evaluated, and how.",
    "trainer": "The length of the run, its output and its machines.",
}
COMPLETION = """\
# Completes flags, keys, their values, recipes and the files of conf/: . scripts/completion.bash
# Written by scripts/generate_reference.py from sft_recipe/config/schema.py; do not edit.
_sft_recipe_conf=$(cd "$(dirname "${BASH_SOURCE[0]}")/../conf" && pwd)
_sft_recipe_flags='<flags>'
_sft_recipe_keys='<keys>'
_sft_recipe_values='<values>'
_sft_recipe_valued='<valued>'

_sft_recipe() {
  local line=${COMP_LINE:0:COMP_POINT} word words before value file index recipes=
  word=${line##* }
  before=${line%"$word"}
  before=${before%"${before##*[! ]}"}
  before=${before##* }
  for file in "$_sft_recipe_conf"/recipe/*.yaml; do file=${file##*/} && recipes+=" @${file%.yaml}"; done
  case $word in
    --recipe=* | trainer.recipe=*) words=${recipes//@/${word%%=*}=} ;;
    -*=*) words=$_sft_recipe_values ;;
    -*) words=$_sft_recipe_flags ;;
    *=*)
      words=$_sft_recipe_values
      for file in "$_sft_recipe_conf/${word%%=*}"/*.yaml; do
        [ -e "$file" ] && file=${file##*/} && words+=" ${word%%=*}=${file%.yaml}"
      done
      ;;
    *)
      words=$_sft_recipe_keys
      for file in "$_sft_recipe_conf"/*/; do file=${file%/}; words+=" ${file##*/}="; done
      if [ "$before" = --recipe ]; then
        words=${recipes//@/}
      elif [[ $'\\n'$_sft_recipe_valued$'\\n' == *$'\\n'"$before"$'\\n'* ]]; then
        words= # the values of this flag; where there are none, bash completes files
        for value in $_sft_recipe_values; do [[ $value != "$before="* ]] || words+=" ${value#*=}"; done
      fi
      ;;
  esac
  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
  for index in "${!COMPREPLY[@]}"; do
    [[ ${COMPREPLY[index]} == *= ]] || COMPREPLY[index]+=" "
    # Bash replaces only what follows the last =, unless that is no separator of words.
    [[ $COMP_WORDBREAKS != *=* ]] || COMPREPLY[index]=${COMPREPLY[index]#"${word%"${word##*=}"}"}
  done
}
complete -o default -o nospace -F _sft_recipe train.sh preview_data.py preview_schedule.py
"""


def generated() -> dict[Path, str]:
    """Return the path and the text of every generated file; a file or marker that does not exist is left out."""
    texts = {HOME / "conf" / group / "default.yaml": group_file(group) for group in HEADINGS if group != "trainer"}
    texts[HOME / "docs/reference/configuration.md"] = reference()
    texts[HOME / "conf/config.schema.json"] = json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"
    texts[HOME / "scripts/completion.bash"] = completion()
    blocks = [
        (HOME / "config.yaml", r"(?m)(?<=^trainer:\n)(?:[ #].*\n|\n)*", yaml_section("trainer", "  ")),
        (
            HOME / "sft_recipe/cli/flags.py",
            r"(?<=schema\.py\)\n)(?:.*\n)*?(?=    # end: flags\n)",
            "".join(python_flags()),
        ),
        (
            HOME / "README.md",
            r"(?<=<!-- begin: flags -->\n)(?:.*\n)*?(?=<!-- end: flags -->)",
            f"\n{flag_table()}\n",
        ),
    ]
    for path, block, text in blocks:
        if path.is_file():
            texts[path] = re.sub(block, lambda _, text=text: text, path.read_text(encoding="utf-8"), count=1)
    return texts


def group_file(group: str) -> str:
    """Return conf/<group>/default.yaml."""
    return f"# {HEADINGS[group]}\n{yaml_section(group)}"


def yaml_section(group: str, indent: str = "") -> str:
    """Return the keys of a group as YAML, each with its default and a comment."""
    return "".join(_yaml_lines(Config.model_fields[group].annotation, indent))


def _yaml_lines(model: Any, indent: str) -> Iterator[str]:
    for name, info in model.model_fields.items():
        if _is_group(info):
            yield f"{indent}{name}:\n"
            yield from _yaml_lines(info.annotation, f"{indent}  ")
            continue
        start = f"{indent}{name}: {_yaml_default(info)}".ljust(COMMENT_COLUMN - 2) + "  "
        comment = textwrap.wrap(
            info.description or "",
            LINE_LENGTH,
            initial_indent=f"{'':{len(start)}}# ",
            subsequent_indent=f"{'':{COMMENT_COLUMN}}# ",
        )
        yield start + "\n".join(comment).lstrip() + "\n"


def python_flags() -> Iterator[str]:
    """Yield the lines of the flags in cli/flags.py, in ruff's format."""
    for key, info in fields():
        if not (extra := _extra(info)).get("flag"):
            continue
        several = info.annotation is not None and "list[str]" in str(info.annotation)
        arguments = [f'"{extra["flag"]}"', f'"{key}"', f'"{_shown_default(info)}"', f'"{info.description}"']
        arguments += [f'short="{extra["short"]}"'] if extra["short"] else []
        arguments += ["is_switch=True"] if info.annotation is bool else []
        arguments += ["takes_several=True"] if several else []
        line = f"    Flag({', '.join(arguments)}),\n"
        if len(line) <= LINE_LENGTH + 1:
            yield line
        elif len(inner := f"        {', '.join(arguments)}\n") <= LINE_LENGTH + 1:
            yield f"    Flag(\n{inner}    ),\n"
        else:
            yield "    Flag(\n" + "".join(f"        {argument},\n" for argument in arguments) + "    ),\n"


def flag_table() -> str:
    """Return the flag table of README.md."""
    rows = ["| variable | default | meaning | key |", "|---|---|---|---|"]
    for key, info in fields():
        extra = _extra(info)
        if extra.get("flag"):
            short = f" (`--{extra['short']}`)" if extra["short"] else ""
            default = extra.get("shown_default") or f"`{_shown_default(info)}`"
            rows.append(f"| `{extra['flag'].upper()}`{short} | {default} | {_markdown(info.description)} | `{key}` |")
    return "\n".join(rows) + "\n"


def completion() -> str:
    """Return scripts/completion.bash: the flags, keys and values that a shell completes."""
    flags = [f"--{name}" for _, info in fields() for name in flag_names(info)]
    flags += [
        "--config-path",
        "--config-name",
        "--dry_run",
        "--check",
        "--launcher",
        "--multirun",
        "--lang",
        "--recipes",
    ]
    flags += ["--help"]
    values = [f"{key}={value}" for key, info in fields() for value in _choices(info.annotation)]
    values += [
        f"--{name}={value}" for _, info in fields() for name in flag_names(info) for value in _choices(info.annotation)
    ]
    values += [f"--launcher={name}" for name in ("local", "ray", "slurm")] + ["--lang=en", "--lang=zh"]
    switches = [f"--{name}" for _, info in fields() for name in flag_names(info) if info.annotation is bool]
    switches += ["--dry_run", "--check", "--multirun", "--recipes", "--help"]
    valued = [flag for flag in flags if flag not in switches]
    lists = {"flags": flags, "keys": [f"{key}=" for key, _ in fields()], "values": values, "valued": valued}
    text = COMPLETION
    for name, words in lists.items():
        text = text.replace(f"<{name}>", "\n".join(words))
    return text


def _choices(annotation: Any) -> list[str]:
    """The values of a type that is a choice, as they are written on a command line."""
    if annotation is bool:
        return ["true", "false"]
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [str(part) for part in parts]
    return (
        [choice for part in parts for choice in _choices(part)] if get_origin(annotation) in (Union, UnionType) else []
    )


def reference() -> str:
    """Return docs/reference/configuration.md: all keys."""
    text = [
        "# Configuration reference\n\n"
        "<!-- Written by scripts/generate_reference.py from sft_recipe/config/schema.py; do not edit. -->\n\n"
        "Every key can be set in `config.yaml`, or as an override on the command line: `./train.sh optim.lr=1e-5`.\n"
        "A key with a flag can also be set by the flag and by an environment variable of the same name in capitals,\n"
        "`LR=1e-5` or `LEARNING_RATE=1e-5`.\n"
        "Precedence: override > flag > environment variable > recipe > `config.yaml` > `conf/`.\n"
    ]
    for group, heading in HEADINGS.items():
        text.append(f"\n## {group}\n\n{heading}\n\n| key | type | default | meaning | flag |\n|---|---|---|---|---|\n")
        for key, info in fields():
            if key.startswith(f"{group}."):
                flag = f"`--{_extra(info)['flag']}`" if _extra(info).get("flag") else ""
                default = _yaml_default(info)
                kind = _markdown(_type_name(info))
                text.append(f"| `{key}` | {kind} | `{default}` | {_markdown(info.description)} | {flag} |\n")
    return "".join(text)


def _is_group(info: FieldInfo) -> bool:
    return isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)


def _extra(info: FieldInfo) -> dict[str, Any]:
    return info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}


def _yaml_default(info: FieldInfo) -> str:
    return str(_extra(info).get("yaml") or _as_yaml(info.default))


def _as_yaml(value: Any) -> str:
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:e}".split("e")  # 2e-05 would be text in YAML 1.1
        return f"{float(mantissa)}e{int(exponent)}"
    plain = to_jsonable_python(value)
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def _shown_default(info: FieldInfo) -> str:
    default = info.default
    if isinstance(default, float) and default < 1e-3:
        return f"{default:g}".replace("e-0", "e-")
    return str(_extra(info).get("shown_default") or _as_yaml(default))


def _type_name(info: FieldInfo) -> str:
    words = {"str": "text", "int": "integer", "float": "number", "bool": "boolean", "None": "null", "NoneType": "null"}
    text = info.annotation.__name__ if info.annotation in (str, int, float, bool) else str(info.annotation)
    text = re.sub(r"Union\[(.*)\]", lambda m: m[1].replace("], ", "] | ").replace("int, ", "int | "), text)
    text = re.sub(r"Literal\[(.*?)\]", r"\1", text.replace("typing.", ""))
    text = text.replace("dict[str, Any]", "mapping").replace("dict[str, str]", "mapping").replace("'", "")
    text = text.replace("tuple[float, float]", "[number, number]").replace("list[str]", "list of texts")
    text = re.sub(r"list\[(.*?)\]", r"list of \1", text)
    return re.sub(r"\b(str|int|float|bool|NoneType|None)\b", lambda m: words[m[1]], text).replace(" | ", ", ")


def _markdown(text: str | None) -> str:
    return re.sub(r"([|<>*])", r"\\\1", text or "")


def main(args: list[str]) -> int:
    """Write the generated files, or with --check report those that differ; returns the exit code."""
    different = []
    for path, text in generated().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            different.append(path)
            if "--check" not in args:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    for path in different:
        print(path.relative_to(HOME))
    return 1 if different and "--check" in args else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
