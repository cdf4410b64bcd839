"""Benchmarks of lm-evaluation-harness (the package lm_eval): finds its tasks, runs them, and reads its results."""

import difflib
import logging
import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sft_recipe.errors import ConfigError, DataError, ModelError, first_line, is_debugging

BATCH_SIZE = 8


@dataclass(frozen=True)
class TaskResult:
    """Holds the scores of a task or group: metric -> value and standard error, None where there is no estimate of it.

    `samples` counts the examples, `version` is that of the task's definition; `num_fewshot` may differ from what was
    asked for, since some tasks fix it.
    """

    version: Any
    num_fewshot: int | None
    samples: int | None
    scores: dict[str, tuple[float, float | None]]


def find_tasks(names: Sequence[str], include_path: Path | None) -> Any:
    """Return lm_eval's manager of the tasks that it has, and of those that YAML files in `include_path` define.

    Raises ConfigError for a name that is no task, with the nearest one.
    """
    from lm_eval.tasks import TaskManager

    if not is_debugging():
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about how it is called
    try:
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    except Exception as error:  # of yaml, or of lm_eval for a file that it does not understand
        raise ConfigError(f"--include_path {include_path}: a task cannot be read: {first_line(error)}") from None
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; `lm_eval ls tasks` lists all, --include_path adds some"
            raise ConfigError(f"--tasks: lm_eval has no task {name}{hint}")
    return manager


def run_tasks(
    manager: Any,
    names: Sequence[str],
    module: Any,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    num_fewshot: int | None,
    apply_chat_template: bool,
) -> dict[str, TaskResult]:
    """Return the results of tasks by name, those of the parts of groups as well; a progress bar is on stderr.

    Log-likelihoods are computed in fp32. Raises DataError where the data of a task cannot be loaded or it fails
    otherwise, and ModelError where the device has too little memory.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        with redirect_stdout(sys.stderr):
            model = HFLM(module, tokenizer=tokenizer, batch_size=BATCH_SIZE, softmax_dtype=torch.float32)
            found: Any = simple_evaluate(
                model,
                tasks=list(names),
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=apply_chat_template,
                log_samples=False,
            )
    except torch.OutOfMemoryError:
        raise ModelError(f"{module.device} has too little free memory for {BATCH_SIZE} texts of these tasks") from None
    except Exception as error:  # of datasets, of the hub, or of a task's own code
        raise DataError(
            f"--tasks {','.join(names)}: {first_line(error)}. Tasks download their data from the hub when they run for "
            "the first time, unless their definition names local files."
        ) from None
    return {name: _result(found, name) for name in {**found["results"], **found.get("groups", {})}}


def _result(found: dict[str, Any], name: str) -> TaskResult:
    """Keys are "acc,none" and "acc_stderr,none": the metric and the filter of the answers, "none" for no filter."""
    values = {**found["results"], **found.get("groups", {})}[name]
    scores = {}
    for key, value in values.items():
        metric, comma, answers = key.partition(",")
        if comma and isinstance(value, int | float) and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{answers}")
            has_error = isinstance(error, int | float) and math.isfinite(error)  # "N/A" where there is none
            shown = metric if answers == "none" else f"{metric} ({answers})"
            scores[shown] = (float(value), float(error) if has_error else None)
    samples = found["n-samples"].get(name, {}).get("effective")
    version = found["versions"].get(name)
    return TaskResult(None if version == "N/A" else version, found["n-shot"].get(name), samples, scores)
