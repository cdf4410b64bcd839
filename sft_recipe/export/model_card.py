"""The model card: where a model comes from, how it was trained, what it scored, and how its export was verified."""

import json
from pathlib import Path
from typing import Any

import yaml

from sft_recipe.checkpoint.manifest import read_manifest
from sft_recipe.export.options import Written
from sft_recipe.export.source import Source, model_of_run, run_config
from sft_recipe.export.verification import PROMPTS, Verification

SETTINGS = {
    "examples per step": "data.train_batch_size",
    "longest example (tokens)": "data.max_length",
    "supervised turns": "data.train_on",
    "learning rate": "optim.lr",
    "schedule": "optim.lr_scheduler_type",
    "optimizer": "optim.optimizer",
    "weight decay": "optim.weight_decay",
    "strategy": "fsdp.strategy",
    "seed": "trainer.seed",
}
ADAPTERS = {"LoRA rank": "lora.rank", "LoRA alpha": "lora.alpha", "LoRA modules": "lora.target_modules"}
ADAPTERS |= {"base in 4 bits (QLoRA)": "lora.quantize"}


def model_card(source: Source, written: Written, verification: Verification, title: str) -> str:
    """Return the text of README.md."""
    kind, dtype = written.kind, written.dtype
    config = run_config(source.run) if source.run else {}
    trained_from = model_of_run(source.checkpoint) if source.checkpoint else None
    base = _public(trained_from or (source.base.name if source.adapter else ""))
    parts = [_front_matter(kind, base), f"# {title}", _summary(kind, dtype, base)]
    if source.checkpoint:
        manifest = read_manifest(source.checkpoint)
        parts += [_data(config, manifest), _settings(source, config, manifest), _scores(source, manifest["step"])]
        parts += [_findings(source)]
    parts += [_verification(verification, dtype), f"## Use\n\n{written.usage}", *written.remarks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(kind: str, base: str) -> str:
    matter: dict[str, Any] = {"pipeline_tag": "text-generation", "tags": ["sft", "sft_recipe"]}
    matter["library_name"] = "peft" if kind == "adapter" else "gguf" if "GGUF" in kind else "transformers"
    if kind == "adapter":
        matter["tags"].append("lora")
    if base.count("/") == 1 and not Path(base).exists() and not base.startswith("."):
        matter["base_model"] = base
    return "---\n" + yaml.safe_dump(matter, sort_keys=True) + "---"


def _summary(kind: str, dtype: str, base: str) -> str:
    origin = f", fine-tuned from `{base}` with sft_recipe" if base else ""
    article = "An" if kind[0] in "aeiou" else "A"
    return f"{article} {kind} in {dtype}{origin}."


def _data(config: dict[str, Any], manifest: dict[str, Any]) -> str:
    rows = {"training files": _public(_get(config, "data.train_files")), "examples": manifest["identity"]["examples"]}
    ratio = _get(config, "data.val_ratio")
    held_out = f"{ratio:g} of the examples, held out" if ratio else "none"
    rows["validation"] = _public(_get(config, "data.val_files")) or held_out
    return "## Data\n\n" + _table(rows)


def _settings(source: Source, config: dict[str, Any], manifest: dict[str, Any]) -> str:
    rows = {"step": f"{manifest['step']} of {manifest['total_steps']} (epoch {manifest['epoch']:g})"}
    keys = SETTINGS | (ADAPTERS if _get(config, "lora.enabled") else {})
    rows |= {name: _get(config, key) for name, key in keys.items()}
    rows["strategy"] = _strategy(source) or rows["strategy"]
    rows["ranks"] = manifest["world_size"]
    rows |= {f"version of {name}": version for name, version in manifest["versions"].items()}
    return "## Settings\n\n" + _table(rows)


def _strategy(source: Source) -> str:
    """The strategy that ran, which may be another than the configured one; empty for runs that did not record it."""
    assert source.run
    try:
        found = json.loads((source.run / "run.json").read_text(encoding="utf-8"))
        return found["strategy"] if isinstance(found["strategy"], str) else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _scores(source: Source, step: int) -> str:
    row = _metrics(source, step)
    scores = {key: value for key, value in row.items() if key.startswith(("val/", "eval/")) or key == "train/loss"}
    numbers = {key: f"{value:.6g}" for key, value in scores.items() if isinstance(value, int | float)}
    return f"## Scores at step {step}\n\n{_table(numbers)}" if numbers else ""


def _findings(source: Source) -> str:
    """The newest findings that the run recorded, as plain sentences."""
    assert source.run
    try:
        found = json.loads((source.run / "findings.json").read_text(encoding="utf-8"))
        lines = [f"- {item['text'] if isinstance(item, dict) else item}" for item in found]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return "## Findings\n\n" + "\n".join(lines) if lines else ""


def _verification(verification: Verification, dtype: str) -> str:
    rows = {
        "prompts": verification.prompts,
        "largest difference of a logit": f"{verification.largest_difference:.3g}",
        "root mean square, relative to that of the logits": f"{100 * verification.relative_difference:.2g}%",
        f"bound for {dtype}": f"{100 * verification.bound:.2g}%",
        "same greedy tokens": f"{verification.same_choices} of {verification.tokens}",
    }
    if verification.is_rounding:
        rows["above the bound"] = f"rounding alone: the checkpoint with weights in {dtype} computes the same"
    text = (
        f"The export was loaded back and compared with the trained checkpoint on the greedy answers to {len(PROMPTS)} "
        "prompts, both computed in fp32."
    )
    return f"## Verification\n\n{text}\n\n{_table(rows)}"


def _metrics(source: Source, step: int) -> dict[str, Any]:
    """Return the row of metrics.jsonl for a step; empty where there is none."""
    assert source.run
    try:
        lines = (source.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return {}
    return next((row for row in rows if row.get("step") == step), {})


def _get(config: dict[str, Any], key: str) -> Any:
    group, _, name = key.partition(".")
    return (config.get(group) or {}).get(name)


def _public(value: Any) -> Any:
    """Return the value without the folders of this machine: of an absolute path, the last name."""
    if isinstance(value, dict):
        return [f"{name}: {_public(part)}" for name, part in value.items()]
    if isinstance(value, list):
        return [_public(part) for part in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|")
