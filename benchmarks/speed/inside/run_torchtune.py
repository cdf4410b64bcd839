"""python run_torchtune.py JOB.json: torchtune's recipe full_finetune_single_device on the CPU; option: weights.

The model is built with torchtune's builder for Llama 3.2 (tied embeddings; scale_factor=1 leaves the rotary embedding
plain). The recipe's file is loaded from the installed package, and called as its own main does.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import stopwatch
import torch
from chatml import encode
from job import micro_batches, read_job
from omegaconf import OmegaConf
from tokenizers import Tokenizer

job = read_job()


class JobTokenizer:
    """All that the recipe asks of it."""

    pad_id = stopwatch.PAD


class Rows(torch.utils.data.Dataset):
    """As torchtune's own chat data sets: the line break after the answer is supervised too."""

    def __init__(self):
        tokenizer = Tokenizer.from_file(f"{job.model}/tokenizer.json")
        end = tokenizer.encode("\n", add_special_tokens=False).ids
        self.rows = []
        with open(job.train) as file:
            records = [json.loads(line) for line in file]
        for record in records:
            prompt, answer = encode(tokenizer, record["messages"])
            tokens, labels = prompt + answer + end, [-100] * len(prompt) + answer + end
            self.rows.append({"tokens": tokens[: job.max_length], "labels": labels[: job.max_length]})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return dict(self.rows[number])


parts = types.ModuleType("parts")
parts.tokenizer, parts.dataset = JobTokenizer, lambda tokenizer, packed=False: Rows()
sys.modules["parts"] = parts
model = json.loads(Path(job.model, "config.json").read_text())
config = OmegaConf.create(
    dict(
        output_dir=f"{job.out}/tune",
        model=dict(
            _component_="torchtune.models.llama3_2._component_builders.llama3_2",
            vocab_size=model["vocab_size"],
            num_layers=model["num_hidden_layers"],
            num_heads=model["num_attention_heads"],
            num_kv_heads=model["num_key_value_heads"],
            embed_dim=model["hidden_size"],
            max_seq_len=2048,
            rope_base=int(model["rope_theta"]),
            intermediate_dim=model["intermediate_size"],
            norm_eps=model["rms_norm_eps"],
            scale_factor=1,
            tie_word_embeddings=True,
        ),
        tokenizer=dict(_component_="parts.tokenizer"),
        dataset=dict(_component_="parts.dataset", packed=False),
        seed=job.seed,
        shuffle=True,
        checkpointer=dict(
            _component_="torchtune.training.FullModelHFCheckpointer",
            checkpoint_dir=job.model,
            checkpoint_files=["model.safetensors"],
            recipe_checkpoint=None,
            output_dir=f"{job.out}/tune",
            model_type="LLAMA3_2",
        ),
        resume_from_checkpoint=False,
        batch_size=job.options.examples,
        epochs=1,
        optimizer=dict(_component_="torch.optim.AdamW", lr=job.lr, weight_decay=job.weight_decay, fused=True),
        loss=dict(_component_="torchtune.modules.loss.CEWithChunkedOutputLoss"),
        max_steps_per_epoch=job.steps,
        gradient_accumulation_steps=micro_batches(job),
        optimizer_in_bwd=False,
        clip_grad_norm=job.clip,
        compile=False,
        device="cpu",
        enable_activation_checkpointing=False,
        enable_activation_offloading=False,
        dtype=job.options.weights,
        metric_logger=dict(_component_="torchtune.training.metric_logging.DiskLogger", log_dir=f"{job.out}/tune/logs"),
        log_every_n_steps=1,
        log_peak_memory_stats=False,
    )
)
site = Path(importlib.util.find_spec("torchtune").origin).parent.parent
spec = importlib.util.spec_from_file_location("recipe", site / "recipes/full_finetune_single_device.py")
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)


class TimedRecipe(recipe.FullFinetuneRecipeSingleDevice):
    def _loss_step(self, batch):
        stopwatch.saw(batch["tokens"], batch["labels"])
        return super()._loss_step(batch)

    def save_checkpoint(self, epoch):
        if job.save:
            super().save_checkpoint(epoch)


run = TimedRecipe(cfg=config)
run.setup(cfg=config)
run.train()
run.cleanup()
if job.save:
    Path(job.out, "tune/epoch_0").rename(job.save)
