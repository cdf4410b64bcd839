"""python run_llamafactory.py JOB.json: LLaMA-Factory, as its command line; options: packing (neat), accumulate."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import yaml
from job import read_job, trainer_arguments, watch_trainer
from transformers import TrainingArguments

job = read_job()
watch_trainer()
tags = {"role_tag": "role", "content_tag": "content"}
tags |= {f"{role}_tag": role for role in ("user", "assistant", "system")}
columns = {"messages": "messages"}
about = {"file_name": job.train, "formatting": "sharegpt", "columns": columns, "tags": tags}
(Path(job.out) / "dataset_info.json").write_text(json.dumps({"job": about}))
packing = getattr(job.options, "packing", False)
settings = trainer_arguments(job, TrainingArguments.__dataclass_fields__)
settings |= dict(
    stage="sft",
    do_train=True,
    model_name_or_path=job.model,
    dataset="job",
    dataset_dir=job.out,
    template="smollm2",
    cutoff_len=job.max_length,
    packing=packing,
    neat_packing=packing,
    finetuning_type="lora" if job.lora else "full",
    disable_gradient_checkpointing=job.device == "cpu",
    preprocessing_num_workers=1,
    plot_loss=False,
    output_dir=job.save or f"{job.out}/trainer",
)
if job.lora:
    settings |= dict(lora_rank=job.lora.rank, lora_alpha=job.lora.alpha, lora_dropout=0.0, lora_target="all")
path = Path(job.out) / "job.yaml"
path.write_text(yaml.safe_dump(settings))
if importlib.util.find_spec("torchaudio") is None:  # imported at the top of its multimodal part, and not used for text
    stub = types.ModuleType("torchaudio")
    stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = stub
sys.argv = ["llamafactory-cli", "train", str(path)]
from llamafactory.cli import main  # noqa: E402

main()
