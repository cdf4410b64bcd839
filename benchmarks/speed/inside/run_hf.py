"""python run_hf.py JOB.json: transformers' own Trainer, rows padded to the longest of a micro-batch."""

import torch
from datasets import load_dataset
from job import adapters, attention, read_job, trainer_arguments, watch_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

job = read_job()
watch_trainer()
tokenizer = AutoTokenizer.from_pretrained(job.model)


def encode(record, max_length):
    """The usual recipe: the template on the whole conversation; labels start where the prompt ends."""
    turns = record["messages"]
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    unlearnt = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    labels = [-100] * unlearnt + ids[unlearnt:]
    return {"input_ids": ids[:max_length], "attention_mask": [1] * len(ids[:max_length]), "labels": labels[:max_length]}


records = load_dataset("json", data_files=job.train, split="train")
dataset = records.map(encode, fn_kwargs={"max_length": job.max_length}, remove_columns=records.column_names)
dtype = torch.bfloat16 if job.weights == "bf16" else torch.float32
model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, attn_implementation=attention(job))
if job.lora:
    from peft import get_peft_model

    model.enable_input_require_grads() if job.device == "cuda" else None  # for gradient checkpointing
    model = get_peft_model(model, adapters(job))
trainer = Trainer(
    model=model,
    args=TrainingArguments(**trainer_arguments(job, TrainingArguments.__dataclass_fields__)),
    train_dataset=dataset,
    data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100),
)
trainer.train()
if job.save:
    trainer.save_model(job.save)
