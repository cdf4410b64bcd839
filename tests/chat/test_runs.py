"""Models of real runs answer as transformers and peft do with the same files."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_recipe.chat.compare import load_models
from sft_recipe.chat.sampling import Sampling
from sft_recipe.chat.session import Session
from tests.support.runs import run_here
from tests.support.small_run import RECORDS, arguments

QUESTION = RECORDS[3]["prompt"]


def greedy(model, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    options = dict(attention_mask=torch.ones_like(ids), pad_token_id=0, max_new_tokens=20, do_sample=False)
    answer = model.eval().generate(input_ids=ids, **options)[0, ids.shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("lora", [False, True])
def test_run_and_what_it_was_trained_from_are_compared(lora, model_dir, tmp_path):
    extra = ["lora.enabled=true", "optim.lr=5e-2"] if lora else []
    assert run_here(*arguments(model_dir, tmp_path, "trainer.total_training_steps=4", *extra)) == 0
    export = tmp_path / "out/checkpoints/step_4/huggingface"
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    before = greedy(base, export)
    trained = PeftModel.from_pretrained(base, export) if lora else AutoModelForCausalLM.from_pretrained(export)
    models = load_models(str(tmp_path / "out"), "", torch.device("cpu"))
    assert [model.name for model in models] == [str(model_dir), str(tmp_path / "out")]
    assert (models[0]._module is models[1]._module) == lora
    replies = [Session(model, Sampling(max_new_tokens=20)).ask(QUESTION) for model in models]
    assert [reply.content for reply in replies] == [before, greedy(trained, export)]
    assert replies[0].content != replies[1].content
    assert models[1].stop_token_ids == _end_tokens(export)


def _end_tokens(export):
    ends = json.loads((export / "generation_config.json").read_text())["eos_token_id"]
    return ends if isinstance(ends, list) else [ends]
