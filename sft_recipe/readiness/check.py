"""Runs all checks of a configuration, in the order in which a run would meet them."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipe.checkpoint.manifest import read_manifest
from sft_recipe.config.auto import PACKED_ATTENTION
from sft_recipe.config.preflight import check_config
from sft_recipe.config.schema import Config
from sft_recipe.data.run_inputs import DATE, RunInputs, prepare, store_options
from sft_recipe.errors import RecipeError
from sft_recipe.evaluation.generation import answer_generator
from sft_recipe.models.families import family_of, fit
from sft_recipe.models.hf_config import load_hf_config
from sft_recipe.models.memory_estimate import device_memory
from sft_recipe.models.resolve import resolve_model, resolve_tokenizer
from sft_recipe.models.stats import StatsOf
from sft_recipe.models.tokenizer import load_tokenizer
from sft_recipe.readiness.data import example_checks, record_checks
from sft_recipe.readiness.findings import Check, failed, warned
from sft_recipe.readiness.machine import machine_checks
from sft_recipe.readiness.model import model_checks, tokenizer_checks
from sft_recipe.readiness.plan import Done, disk_checks, measured, memory_checks, plan_checks
from sft_recipe.readiness.run_folder import resume_checks, run_folder_checks
from sft_recipe.training.schedule import Schedule, workload_of


@dataclass(frozen=True)
class Machine:
    """Another machine that is asked about: `gpus` with `memory` bytes each, which multiply bf16."""

    gpus: int
    memory: int


def for_machine(config: Config, machine: Machine) -> Config:
    """Return the configuration with what `auto` would choose on that machine."""
    trainer = config.trainer.model_copy(update={"n_gpus_per_node": machine.gpus, "device": "cuda"})
    precision = config.fsdp.mixed_precision
    if precision.param_dtype == "auto":
        precision = precision.model_copy(update={"param_dtype": "bf16"})
    model = config.model
    if model.attn_implementation == "auto":
        model = model.model_copy(update={"attn_implementation": PACKED_ATTENTION})
    fsdp = config.fsdp.model_copy(update={"mixed_precision": precision})
    return config.model_copy(update={"trainer": trainer, "fsdp": fsdp, "model": model})


def check_readiness(config: Config, machine: Machine | None, measures: bool) -> Iterator[Check]:
    """Yield the checks; with `machine` those of this one are left out, with `measures` a few steps are trained."""
    resume = None
    if machine:
        config = for_machine(config, machine)
        device, memory = "cuda", machine.memory
        try:
            check_config(config, device)
        except RecipeError as error:
            yield failed("settings", "{error}", "", error=error)
        if config.trainer.resume_from:
            yield warned("run folder", "--resume_from is not looked at for another machine: all steps count", "")
    else:
        found = list(machine_checks(config))
        yield from found
        refused = {check.name for check in found if check.status == "error"}
        is_usable = "device" not in refused
        if "output folder" not in refused:
            checks, resume = run_folder_checks(config)
            yield from checks
        device = _device() if is_usable and config.trainer.device != "cpu" else "cpu"
        os.environ["LOCAL_WORLD_SIZE"] = str(config.trainer.n_gpus_per_node)
        memory = device_memory(device)
        os.environ["LOCAL_WORLD_SIZE"] = "1"
        measures = measures and is_usable
    problem = None
    try:  # before the records: which of them can be used depends on the kind of the model
        model = resolve_model(config.model, config.cache_dir())
        hf_config = load_hf_config(config.model, model)
        config = fit(config, hf_config)
    except RecipeError as error:
        problem = failed("model", "{error}", "", error=error)
    is_readable = True
    for check in record_checks(config):
        is_readable = is_readable and check.status != "error"
        yield check
    if problem:
        yield problem
        return
    try:
        stats_of = StatsOf(model, device)
        yield from model_checks(config, model, stats_of(config))
        folder = resolve_tokenizer(config.model, model, config.cache_dir())
        tokenizer = load_tokenizer(config.model, folder, family_of(hf_config))
        yield from tokenizer_checks(tokenizer, store_options(config, hf_config))
    except RecipeError as error:
        yield failed("model", "{error}", "", error=error)
        return
    if is_readable:
        yield from _run_checks(config, stats_of, device, memory, measures, resume, machine)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.device_count() else "cpu"


def _run_checks(
    config: Config,
    stats_of: StatsOf,
    device: str,
    memory: int,
    measures: bool,
    resume: Path | None,
    machine: Machine | None,
) -> Iterator[Check]:
    """Yield the checks that need tokenized data."""
    try:
        inputs, notices = _inputs(config, resume)
    except RecipeError as error:
        yield failed("data", "{error}", "scripts/preview_data.py shows the data", error=error)
        return
    if resume:
        yield from resume_checks(config, inputs, resume)
    known = stats_of.model.notice  # the checks of the model have it
    yield from example_checks(config, inputs, [notice for notice in notices if notice != known])
    examples, tokens = len(inputs.train), int(inputs.train.lengths.sum())
    yield from _position_checks(config, stats_of, inputs)
    try:
        answer_generator(config, inputs, lambda *_: [])
    except RecipeError as error:
        yield failed("validation", "{error}", "", error=error)
    done, schedule = Done.before(config, resume), Schedule.from_config(config, examples)
    yield from plan_checks(config, examples, tokens, done)
    yield from memory_checks(config, stats_of, workload_of(config, inputs.train), device, memory)
    yield from disk_checks(config, stats_of(config), schedule, done, is_here=not machine)
    if measures and done.left(schedule):
        yield from measured(config, examples, tokens, device, done)


def _position_checks(config: Config, stats_of: StatsOf, inputs: RunInputs) -> Iterator[Check]:
    try:
        if text := inputs.positions_notice(config, stats_of(config).positions):
            yield warned("length of examples", "{notice}", "", notice=text)
    except RecipeError as error:
        yield failed("length of examples", "{error}", "", error=error)


def _inputs(config: Config, resume: Path | None) -> tuple[RunInputs, list[str]]:
    """Prepare the data as the run would, which then finds it prepared; bad records are listed in the cache."""
    notices: list[str] = []
    date = read_manifest(resume)["identity"].get(DATE) if resume else None
    with tempfile.TemporaryDirectory(prefix="sft_recipe-") as temporary:
        folder = config.cache_dir() / "check"
        with suppress(OSError):  # `prepare` finds what is wrong with the cache, if it has to write there
            folder.mkdir(parents=True, exist_ok=True)
        chosen = str(folder) if os.access(folder, os.W_OK) else temporary
        trainer = config.trainer.model_copy(update={"output_dir": chosen})
        return prepare(config.model_copy(update={"trainer": trainer}), 0, notices.append, date), notices


def effective_settings(config: Config) -> dict[str, Any]:
    """Return the settings that matter most, as the run would use them, by the names of their keys."""
    data, trainer = config.data, config.trainer
    return {
        "model.path": config.model.path,
        "data.train_files": data.train_files,
        "data.val_files": data.val_files,
        "data.val_ratio": data.val_ratio,
        "data.max_length": data.max_length,
        **({"data.max_target_length": data.max_target_length} if data.has_targets else {}),
        "data.train_batch_size": data.train_batch_size,
        "data.micro_batch_size_per_gpu": data.micro_batch_size_per_gpu,
        "optim.lr": config.optim.lr,
        "lora.enabled": config.lora.enabled,
        "lora.quantize": config.lora.quantize,
        "fsdp.strategy": config.fsdp.strategy,
        "trainer.total_epochs": trainer.total_epochs,
        "trainer.total_training_steps": trainer.total_training_steps,
        "trainer.output_dir": trainer.output_dir,
        "trainer.n_gpus_per_node": trainer.n_gpus_per_node,
        "trainer.nnodes": trainer.nnodes,
    }
