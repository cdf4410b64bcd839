"""Reads a training YAML of LLaMA-Factory, with its dataset_info.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipe.config.foreign_names import LLAMAFACTORY
from sft_recipe.config.importing.datasets import HUB_NAME, Files, hub_name, is_name
from sft_recipe.config.importing.imported import Imported, with_defaults
from sft_recipe.config.importing.parsing import parse_json
from sft_recipe.config.importing.transformers_args import IGNORED, TRAINING_DEFAULTS, read_lora, read_training
from sft_recipe.errors import ConfigError

# What a setting means that the file leaves out.
DEFAULTS = TRAINING_DEFAULTS | {
    "cutoff_len": 2048,
    "finetuning_type": "lora",
}
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
COLUMNS = {*ALPACA, "messages", "tools", "chosen", "rejected", "images", "videos", "audios"}
INFO = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "subset", "split", "num_samples", "columns", "tags"}
INFO |= {"formatting", "ranking"}
TAGS = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "function_call"}
TAGS |= {"system_tag": "system"}
KNOWN_TAGS = {"human", "gpt", "user", "assistant", "observation", "tool", "function_call", "function", "system"}


def read_llamafactory(given: Mapping[str, Any], path: Path, gpus: int | None) -> Imported:
    """Return the overrides for a configuration. Raises ConfigError where it is not supervised fine-tuning, and where
    dataset_info.json is missing, broken, or lacks a data set.
    """
    if given.get("stage", "sft") != "sft":
        raise ConfigError(f"{path}: stage is {given['stage']}; only sft is supervised fine-tuning")
    imported = Imported(with_defaults(DEFAULTS, given))
    imported.map(LLAMAFACTORY)
    imported.get("stage"), imported.get("dataset_dir")
    read_training(imported, gpus)
    if "data.max_length" in imported.values:
        imported.set("data.truncation", "right", "cutoff_len")  # it cuts
    kind = imported.get("finetuning_type")
    if kind == "lora":
        rank = imported.get("lora_rank", 8)
        read_lora(
            imported,
            rank,
            imported.get("lora_alpha", 2 * rank if isinstance(rank, int) else None),
            imported.get("lora_target", "all"),
        )
        if (bits := imported.get("quantization_bit")) == 4:
            imported.values["lora.quantize"] = True
        elif bits:
            imported.skip("quantization_bit", bits, "a base model is quantized to 4 bits, or not at all")
    elif kind != "full":
        imported.skip("finetuning_type", kind, "full and lora are supported")
    if imported.get("mask_history"):
        imported.set("data.train_on", "last", "mask_history")
    if (count := imported.get("max_samples")) is not None:
        imported.skip("max_samples", count, "it is for each data set; data.limit is for all together")
    if imported.get("deepspeed"):
        imported.skip("deepspeed", given["deepspeed"], "FSDP is used; see fsdp.* in docs/configuration.md")
    template = imported.get("template")
    if template:
        imported.skip(
            "template", template, "the model's own chat template is used; model.chat_template=FILE for another"
        )
    _validation_size(imported)
    for name, key in (("dataset", "data.train_files"), ("eval_dataset", "data.val_files")):
        names = imported.get(name, [])
        names = [part.strip() for part in names.split(",")] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(map(is_name, names)):
            imported.skip(name, names, "it is not a list of names")
            names = []
        _datasets(imported, names, path).write(key, name)
    imported.finish(lambda name: IGNORED.fullmatch(name) is not None)
    return imported


def _validation_size(imported: Imported) -> None:
    size = imported.get("val_size", 0)
    if isinstance(size, int | float) and 0 < size < 1:
        imported.set("data.val_ratio", size, "val_size")
    elif size:
        imported.skip("val_size", size, "data.val_ratio is a fraction")


def _datasets(imported: Imported, names: list[str], path: Path) -> Files:
    files = Files(imported)
    if not names:
        return files
    folder, infos = _dataset_info(str(imported.get("dataset_dir", "data")), path)
    for name in names:
        if name not in infos:
            raise ConfigError(f"{path}: the data set {name} is not in {folder / 'dataset_info.json'}")
        _add(files, name, infos[name], folder)
    return files


def _dataset_info(folder: str, path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the data and its dataset_info.json, from here or from a folder above the configuration."""
    places = [Path(), *path.absolute().parents]
    found = next((place / folder for place in places if (place / folder / "dataset_info.json").is_file()), None)
    if not found:
        raise ConfigError(
            f"{path}: there is no {folder}/dataset_info.json here or above the file; run this where LLaMA-Factory "
            "runs, or write dataset_dir"
        )
    try:
        infos = parse_json((found / "dataset_info.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{found / 'dataset_info.json'} is not valid JSON: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{found / 'dataset_info.json'}: {error}") from None
    if not isinstance(infos, dict):
        raise ConfigError(f"{found / 'dataset_info.json'} is not an object")
    return found, infos


def _add(files: Files, name: str, info: Any, folder: Path) -> None:
    if not isinstance(info, dict):
        files.imported.skip(f"dataset {name}", info, "it is not an object")
        return
    file, hub = info.get("file_name"), info.get("hf_hub_url")
    if is_name(file):
        place = str(folder / file)
    elif is_name(hub) and HUB_NAME.fullmatch(hub):
        place = hub_name(hub, info.get("subset"), info.get("split"))
    else:
        files.imported.skip(f"dataset {name}", info, "only local files and data sets of the Hugging Face hub are read")
        return
    if type(count := info.get("num_samples")) is int and count > 0:
        place += f"#{count}"
    elif count is not None:
        files.imported.skip(f"dataset {name}, num_samples", count, "it is not a number of examples; all are used")
    given, tags = (files.imported.mapping(f"dataset {name}, {key}", info.get(key)) for key in ("columns", "tags"))
    if media := [key for key in ("images", "videos", "audios") if key in given]:
        files.imported.skip(f"dataset {name}", media, "only text is trained on")
    files.imported.list_rest(f"dataset {name}", info, INFO)
    files.imported.list_rest(f"dataset {name}, columns", given, COLUMNS)
    columns: dict[str, str] = {}
    if info.get("formatting", "alpaca") == "alpaca":
        columns = {ALPACA[key]: str(column) for key, column in given.items() if key in ALPACA and column}
    elif given.get("messages") and given["messages"] not in ("messages", "conversations"):
        columns = {"conversations": str(given["messages"])}
    columns |= {key: str(given[key]) for key in ("tools", "system", "chosen") if given.get(key)}
    names = {"role": tags.get("role_tag", "from"), "content": tags.get("content_tag", "value")}
    if names not in ({"role": "role", "content": "content"}, {"role": "from", "content": "value"}):
        columns |= names
    roles = {str(tags[key]): role for key, role in TAGS.items() if key in tags and str(tags[key]) not in KNOWN_TAGS}
    files.add(place, columns, roles)
