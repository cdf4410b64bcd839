"""The job of a runner as an object, read from the JSON file that is its only argument."""

import json
import sys
from types import SimpleNamespace

import stopwatch


def read_job():
    """See `train_speed.Bench._write_job`; `lora` is None for full fine-tuning, `save` None where nothing is saved."""
    with open(sys.argv[1]) as file:
        return json.load(file, object_hook=lambda part: SimpleNamespace(**part))


def micro_batches(job):
    """Micro-batches a step."""
    return getattr(job.options, "accumulate", 0) or -(-job.batch_size // job.options.examples)


def trainer_arguments(job, known):
    """For transformers' Trainer and what is built on it; `known` are the fields that its arguments have."""
    cuda = job.device == "cuda"
    arguments = dict(
        output_dir=f"{job.out}/trainer",
        per_device_train_batch_size=job.options.examples,
        gradient_accumulation_steps=micro_batches(job),
        max_steps=job.steps,
        learning_rate=job.lr,
        weight_decay=job.weight_decay,
        max_grad_norm=job.clip,
        lr_scheduler_type="constant",
        warmup_steps=0,
        seed=job.seed,
        use_cpu=not cuda,
        bf16=job.compute == "bf16",
        gradient_checkpointing=cuda,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_num_workers=0,
        disable_tqdm=True,
    )
    if job.options.examples > 1 and not getattr(job.options, "packing", False):
        by_length = {"train_sampling_strategy": "group_by_length", "group_by_length": True}
        name = next(name for name in by_length if name in known)  # the older name is a switch
        arguments[name] = by_length[name]
    return arguments


def adapters(job):
    """The configuration of LoRA for peft; None for full fine-tuning."""
    if job.lora is None:
        return None
    from peft import LoraConfig

    shape = dict(r=job.lora.rank, lora_alpha=job.lora.alpha, lora_dropout=0.0)
    return LoraConfig(**shape, target_modules="all-linear", task_type="CAUSAL_LM")


def attention(job):
    """Flash attention where there is one, as ours does."""
    found = job.device == "cuda" and __import__("importlib.util").util.find_spec("flash_attn")
    return "flash_attention_2" if found else "sdpa"


def watch_trainer():
    """Let transformers' Trainer, and what is built on it, show its micro-batches to the stopwatch."""
    from transformers import Trainer

    inner = Trainer.training_step

    def training_step(self, model, inputs, *rest, **named):
        stopwatch.saw(inputs["input_ids"], inputs["labels"], inputs.get("attention_mask"))
        return inner(self, model, inputs, *rest, **named)

    Trainer.training_step = training_step
