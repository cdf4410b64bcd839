"""python run_trl.py JOB.json: TRL's SFTTrainer on prompts and completions; options: loss, packing (into max tokens)."""

from datasets import load_dataset
from job import adapters, attention, read_job, trainer_arguments, watch_trainer
from trl import SFTConfig, SFTTrainer

job = read_job()
watch_trainer()


def split(record):
    return {"prompt": record["messages"][:-1], "completion": record["messages"][-1:]}


packing = getattr(job.options, "packing", False)
arguments = trainer_arguments(job, SFTConfig.__dataclass_fields__)
if loss := getattr(job.options, "loss", None):
    arguments["loss_type"] = loss
config = SFTConfig(
    **arguments,
    max_length=job.micro_tokens if packing else job.max_length,
    packing=packing,
    model_init_kwargs={
        "dtype": "bfloat16" if job.weights == "bf16" else "float32",
        "attn_implementation": attention(job),
    },
)
records = load_dataset("json", data_files=job.train, split="train")
dataset = records.map(split, remove_columns=records.column_names)
trainer = SFTTrainer(model=job.model, args=config, train_dataset=dataset, peft_config=adapters(job))
trainer.train()
if job.save:
    trainer.save_model(job.save)
