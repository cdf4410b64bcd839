"""Makes runs of known curves: with noise like that of small batches, and one thing wrong at a time."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from sft_recipe.report.run import Run


def noisy(values: list[float], seed: int = 0, size: float = 0.08) -> list[float]:
    """Return the values with relative noise."""
    generator = random.Random(seed)
    return [value * (1 + generator.gauss(0, size)) for value in values]


def falling(steps: int, start: float = 2.4, end: float = 1.2) -> list[float]:
    """Return a loss that decays from `start` to `end`."""
    return [end + (start - end) * math.exp(-5 * step / steps) for step in range(steps)]


def make_run(
    losses: list[float | None],
    norms: list[float | None] | None = None,
    validation: dict[int, float] | None = None,
    bleu: dict[int, float] | None = None,
    answers: list[tuple[str, bool]] | None = None,
    per_epoch: int | None = None,
    supervised: int = 300,
    rate: float = 2e-5,
    general: dict[int, float] | None = None,
    perf: dict[str, float] | None = None,
    data: dict[str, int] | None = None,
    reference: str = "Yes.",
    **settings: Any,
) -> Run:
    """Return a finished run; `answers` are (text, is_truncated) of the last step, settings have __ for a dot.

    A fifth of the validation tokens are those of `general`, where it is given.
    """
    total = len(losses)
    per_epoch = per_epoch or total
    evaluations = _validation(validation or {}, general) | {"eval/bleu4": bleu or {}}
    found = {
        step: {name: values[step] for name, values in evaluations.items() if step in values}
        for step in range(total + 1)
    }
    rows: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0} | found[0]] if found[0] else []
    for step, loss in enumerate(losses, 1):
        rows.append(
            {
                "step": step,
                "epoch": step / per_epoch,
                "train/loss": loss,
                "train/grad_norm": norms[step - 1] if norms else 1.5,
                "train/lr": rate * min(1, step / max(1, total // 10)),
                "train/tokens": 1000,
                "train/supervised_tokens": supervised,
                "perf/tokens_per_s": 5000.0,
                "perf/memory_gb": 1.5,
                "perf/seconds": 0.5,
                "perf/data_seconds": 0.001,
                "perf/token_efficiency": 1.0,
            }
            | (perf or {})
            | found[step]
        )
    config = _config(rate, max(1, total // per_epoch), total, settings)
    samples = [
        {"set": "", "prompt": "Hi", "reference": reference, "answer": text, "is_truncated": is_truncated}
        for text, is_truncated in answers or []
    ]
    return Run(Path("run"), rows, config, [{"step": total, "samples": samples}] if samples else [], data or {})


def _config(rate: float, epochs: int, total: int, settings: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model": {"path": "tiny"},
        "data": {"train_batch_size": 4, "max_length": 512},
        "optim": {"lr": rate, "lr_warmup_steps": -1, "lr_warmup_steps_ratio": 0.1, "clip_grad": 1.0},
        "lora": {"enabled": False},
        "eval": {"max_new_tokens": 16},
        "trainer": {"total_epochs": epochs, "total_training_steps": total},
    }
    for key, value in settings.items():
        group, _, name = key.partition("__")
        config[group][name] = value
    return config


def _validation(own: dict[int, float], general: dict[int, float] | None) -> dict[str, dict[int, float]]:
    if not general:
        return {"val/loss": own}
    return {
        "val/loss": {step: (4 * own[step] + loss) / 5 for step, loss in general.items()},
        "val/tokens": dict.fromkeys(general, 500),
        "val/general/loss": general,
        "val/general/tokens": dict.fromkeys(general, 100),
    }


def write_run(folder: Path, run: Run) -> Path:
    """Write a run as training does; returns its folder."""
    folder.mkdir(parents=True)
    for name, rows in (("metrics.jsonl", run.rows), ("samples.jsonl", run.samples)):
        if rows:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump({"format_version": 1} | run.config))
    if run.data:
        (folder / "data.json").write_text(json.dumps(run.data))
    return folder
