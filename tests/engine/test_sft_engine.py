"""Loss and gradients of one step against a plain transformers loop that knows nothing of packing, ranks or verl.

Plain SGD with learning rate 1 and no clipping makes the gradient visible from outside: it is what the weights moved by.
"""

import json
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft_recipe.engine.cpu.platform import use_cpu
from tests.support import tiny
from tests.support.runs import metrics, run_here, run_ranks

RECORDS = [
    {"prompt": "Hello there, how are you?", "response": "I am fine, thank you."},
    {"prompt": "What is the capital of France?", "response": "Paris."},
    {"prompt": "你好，今天天气怎么样？", "response": "很好，谢谢。" * 6},
    {"prompt": "def add(a, b):", "response": "    return a + b\n" * 9},
    {"prompt": "1 2 3", "response": "4 5 6 7 8 9 0"},
    # These share a beginning with others, the answer's too.
    {"prompt": "What is the capital of France?", "response": "Paris, which lies on the Seine."},
    {"prompt": "What is the capital of France?", "response": "Paris."},
]
COMMON = [
    "data.train_batch_size=7",
    "data.max_length=256",
    "optim.optimizer=SGD",
    "optim.lr=1.0",
    "optim.lr_scheduler_type=constant",
    "optim.lr_warmup_steps_ratio=0",
    "optim.weight_decay=0",
    "optim.clip_grad=1e9",
    "trainer.total_training_steps=1",
    "fsdp.mixed_precision.param_dtype=fp32",
    "trainer.device=cpu",
]
LORA = ["lora.enabled=true", "lora.merge=true"]
SHAPES = {
    "full": [],
    "untied": [],
    "lora": LORA,
    "lora_on_head": [*LORA, "lora.target_modules=[v_proj,lm_head]"],
}
UNTIED = ("untied", "lora_on_head")
STRATEGIES = ["fsdp", "fsdp2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model, data, and the output folders of every run, made by one process and by two."""
    folder = tmp_path_factory.mktemp("step")
    tiny.build_model(folder / "model")
    tiny.build_model(folder / "untied_model", tie_word_embeddings=False)
    (folder / "data.json").write_text(json.dumps(RECORDS, ensure_ascii=False))
    base = [*COMMON, f"data.train_files={folder}/data.json", f"data.cache_dir={folder}/cache"]
    base.append(f"model.path={folder}/model")
    use_cpu()
    from sft_recipe.engine.sft_engine import SFTEngine

    several = []
    for shape, extra in SHAPES.items():
        for strategy in STRATEGIES:
            arguments = [*base, *extra, f"fsdp.strategy={strategy}", f"model.path={model_of(folder, shape)}"]
            assert run_here(*arguments, f"trainer.output_dir={folder}/{shape}-{strategy}-1") == 0
            several.append([*arguments, f"trainer.output_dir={folder}/{shape}-{strategy}-2"])
    checkpointed = [*base, "model.enable_gradient_checkpointing=true", "data.micro_batch_size_per_gpu=2"]
    assert run_here(*checkpointed, f"trainer.output_dir={folder}/checkpointing-fsdp2-1") == 0
    for gathers in ("true", "false"):
        long = [*base, "trainer.total_training_steps=3", "optim.lr=0.1", f"data.val_files={folder}/data.json"]
        long += ["trainer.test_freq=1", f"fsdp.reshard_after_forward={gathers}", "fsdp.strategy=fsdp2"]
        with patch.object(SFTEngine, "is_unsharded", return_value=False):  # as on one GPU
            assert run_here(*long, f"trainer.output_dir={folder}/resharding-{gathers}-1") == 0
        several.append([*long, f"trainer.output_dir={folder}/resharding-{gathers}-2"])
    assert run_here(*long, f"trainer.output_dir={folder}/whole-1") == 0
    (folder / "three.json").write_text(json.dumps(RECORDS[:1] * 3))  # two for one rank, one for the other
    alone = [*base, f"data.train_files={folder}/three.json", "data.train_batch_size=3", "data.max_length=40"]
    for strategy in STRATEGIES:
        several.append([*alone, f"fsdp.strategy={strategy}", f"trainer.output_dir={folder}/alone-{strategy}-2"])
    assert run_here(*alone, f"trainer.output_dir={folder}/alone-1") == 0
    result = run_ranks(2, *several)
    assert result.returncode == 0, result.stderr
    return folder


def model_of(folder, shape):
    return folder / ("untied_model" if shape in UNTIED else "model")


def plain_loss(model, tokenizer) -> torch.Tensor:
    """Mean over all supervised tokens, one unpadded conversation at a time; the answer and its end token count."""
    total, count = torch.zeros(()), 0
    for record in RECORDS:
        prompt = f"<|im_start|>user\n{record['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = tokenizer(prompt + record["response"] + "<|im_end|>\n", add_special_tokens=False)["input_ids"]
        end = len(ids) - len(tokenizer("\n", add_special_tokens=False)["input_ids"])
        logits = model(torch.tensor([ids])).logits[0].float()
        total = total + F.cross_entropy(
            logits[len(head) - 1 : end - 1], torch.tensor(ids[len(head) : end]), reduction="sum"
        )
        count += end - len(head)
    return total / count


def moved(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The gradient, as SGD with learning rate 1 shows it."""
    return before.float() - after.float()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", ["full", "untied"])
def test_full_step_equals_a_plain_loop(work, tokenizer, shape, strategy, ranks):
    check_full(model_of(work, shape), tokenizer, work / f"{shape}-{strategy}-{ranks}")


def test_gradient_checkpointing_and_larger_packs_change_nothing(work, tokenizer):
    check_full(work / "model", tokenizer, work / "checkpointing-fsdp2-1")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_with_nothing_to_learn_changes_nothing(work, strategy):
    one, two = work / "alone-1", work / f"alone-{strategy}-2"
    assert metrics(two)[0]["train/loss"] == pytest.approx(metrics(one)[0]["train/loss"], rel=1e-6)
    weights = [load_file(run / "checkpoints/step_1/huggingface/model.safetensors") for run in (one, two)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-6)


def test_one_rank_computes_alike_with_fsdp2_and_without(work):
    rows = metrics(work / "resharding-false-1"), metrics(work / "whole-1")
    losses = [
        [row[name] for row in of_run for name in ("train/loss", "train/grad_norm", "val/loss")] for of_run in rows
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_stay_gathered_are_never_stale(work, ranks):
    kept, freed = (
        [
            (row["train/loss"], row["train/grad_norm"], row["val/loss"])
            for row in metrics(work / f"resharding-{how}-{ranks}")
        ]
        for how in ("false", "true")
    )
    assert kept == freed and len(kept) == 3
    assert kept[2][2] < kept[1][2] < kept[0][2]


def check_full(folder, tokenizer, output):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss = plain_loss(model, tokenizer)
    loss.backward()
    assert metrics(output)[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    before = dict(model.named_parameters())
    after = load_file(output / "checkpoints/step_1/huggingface/model.safetensors")
    assert after.keys() == before.keys()
    for name, parameter in before.items():
        torch.testing.assert_close(moved(parameter.data, after[name]), parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("shape", "adapters"), [("lora", 14), ("lora_on_head", 3)])
def test_lora_step_equals_a_plain_peft_loop(work, tokenizer, shape, adapters, strategy, ranks):
    output = work / f"{shape}-{strategy}-{ranks}"
    adapter = output / "checkpoints/step_1/lora_adapter"
    base = AutoModelForCausalLM.from_pretrained(model_of(work, shape), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    # Where training began: A as it is (its gradient is zero while B is), B zero.
    trained = {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.zero_()
    loss = plain_loss(model, tokenizer)
    loss.backward()
    assert metrics(output)[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradients = {name: value.grad for name, value in model.named_parameters() if "lora_B" in name}
    assert len(gradients) == adapters and all(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(-trained[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_merged_logits_equal_adapter_logits(work, tokenizer, ranks):
    step = work / f"lora-fsdp2-{ranks}" / "checkpoints/step_1"
    base = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    ids = torch.tensor([tokenizer("Hello there, how are you today?")["input_ids"]])
    untrained = base(ids).logits
    adapted = PeftModel.from_pretrained(base, step / "lora_adapter")(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(step / "huggingface")(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert (adapted - untrained).abs().max() > 1e-3
