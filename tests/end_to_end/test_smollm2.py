"""Run ./train.sh as a user types it, on a real model (the embedded SmolLM2) and real text."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.runs import ROOT, launch, metrics


def loss_of(folder, path):
    """Mean loss over the answers and their end tokens, by plain transformers in fp32: not every CPU is fast in bf16."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for record in json.loads(path.read_text()):
        asked = [{"role": "user", "content": record["prompt"]}]
        head = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        whole = [*asked, {"role": "assistant", "content": record["response"]}]
        ids = tokenizer.apply_chat_template(whole, return_dict=False)
        end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, len(head) - 1 : end - 1].float()
        total += F.cross_entropy(logits, torch.tensor(ids[len(head) : end]), reduction="sum").item()
        count += end - len(head)
    return total / count


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A few records of the example data in the language that the model knows, for training and for validation."""
    examples = json.loads((ROOT / "data/example_sft.json").read_text())
    english = [record for record in examples if record["response"].isascii()]
    path = tmp_path_factory.mktemp("end_to_end") / "records.json"
    path.write_text(json.dumps(english[:16]))
    return path


def test_embedded_model_replaces_default_with_notice_and_learns(records, tmp_path):
    result = launch(
        "--train_data", str(records), "--val_data", str(records), "--output_dir", str(tmp_path), "--lr", "2e-5",
        "trainer.total_training_steps=6", "trainer.test_freq=3",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Qwen/Qwen2.5-0.5B" in result.stdout and "Training SmolLM2-135M-Instruct instead" in result.stdout
    assert re.search(r"134,515,008 trainable of 134,515,008", result.stdout)
    assert "Traceback" not in result.stderr
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[5]["val/loss"] < rows[2]["val/loss"]
    assert rows[5]["val/loss"] < 3.06  # what plain transformers gives the untrained model
    assert loss_of(tmp_path / "checkpoints/step_6/huggingface", records) == pytest.approx(rows[5]["val/loss"], rel=0.02)


@pytest.mark.slow
def test_lora_on_two_ranks_resumes_with_another_strategy(records, tmp_path):
    flags = ["--use_lora", "--merge_lora", "--n_gpus", "2", "--model", "SmolLM2-135M-Instruct", "--lr", "2e-4"]
    data = ["--train_data", str(records), "--val_data", str(records), "--output_dir", str(tmp_path)]
    result = launch(*flags, *data, "lora=r16", "trainer.total_training_steps=2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "LoRA rank 16, alpha 32" in result.stdout
    result = launch(*flags, *data, "lora=r16", "trainer.total_training_steps=3", "fsdp=fsdp2", RESUME_FROM="auto")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert (tmp_path / "checkpoints/step_3/lora_adapter/adapter_model.safetensors").is_file()
    merged = loss_of(tmp_path / "checkpoints/step_3/huggingface", records)
    assert merged == pytest.approx(rows[2]["val/loss"], rel=0.02)
