"""Loss and gradients of one step against a plain transformers loop without packing, ranks or verl.

SGD with learning rate 1 and no clipping makes the gradient visible from outside: it is the change of the weights.
"""

import json
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from sft_recipe.engine.cpu.platform import use_cpu
from tests.support import tiny
from tests.support.runs import metrics, run_here

RECORDS = [
    {"prompt": "Hello there, how are you?", "response": "I am fine, thank you."},
    {"prompt": "What is the capital of France?", "response": "Paris."},
    {"prompt": "你好，今天天气怎么样？", "response": "很好，谢谢。" * 6},
    {"prompt": "def add(a, b):", "response": "    return a + b\n" * 9},
    {"prompt": "1 2 3", "response": "4 5 6 7 8 9 0"},
    # These share a prefix with others, and a part of the answer.
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
    "optim.clip_grad=0",
    "trainer.total_training_steps=1",
    "fsdp.mixed_precision.param_dtype=fp32",
    "trainer.device=cpu",
]
LORA = ["lora.enabled=true", "lora.merge=true"]
VARIANTS = {
    "full": [],
    "untied": [],
    "lora": LORA,
    "lora_on_head": [*LORA, "lora.target_modules=[v_proj,lm_head]"],
}
UNTIED = ("untied", "lora_on_head")
STRATEGIES = ["fsdp", "fsdp2"]


@pytest.fixture(scope="module")
def work(warm, tmp_path_factory):
    """A model, data, and the output folders of every run, made by one process and by two."""
    folder = tmp_path_factory.mktemp("step")
    tiny.build_model(folder / "model")
    tiny.build_model(folder / "untied_model", tie_word_embeddings=False)
    (folder / "data.json").write_text(json.dumps(RECORDS, ensure_ascii=False))
    base = [*COMMON, f"data.train_files={folder}/data.json", f"data.cache_dir={folder}/cache"]
    base.append(f"model.path={folder}/model")
    use_cpu()
    from sft_recipe.engine.sft_engine import SFTEngine

    on_two_ranks = []
    for variant, extra in VARIANTS.items():
        for strategy in STRATEGIES:
            arguments = [*base, *extra, f"fsdp.strategy={strategy}", f"model.path={model_of(folder, variant)}"]
            assert run_here(*arguments, f"trainer.output_dir={folder}/{variant}-{strategy}-1") == 0
            on_two_ranks.append([*arguments, f"trainer.output_dir={folder}/{variant}-{strategy}-2"])
    checkpointed = [*base, "model.enable_gradient_checkpointing=true", "data.micro_batch_size_per_gpu=2"]
    assert run_here(*checkpointed, f"trainer.output_dir={folder}/checkpointing-fsdp2-1") == 0
    moving = saved_tensors_hooks(lambda tensor: tensor.clone(), lambda copy: copy.clone())
    with patch.object(SFTEngine, "offloading", lambda _: moving):  # as on a GPU
        assert run_here(*checkpointed, f"trainer.output_dir={folder}/offloading-fsdp2-1") == 0
    for reshards in ("true", "false"):
        long = [*base, "trainer.total_training_steps=3", "optim.lr=0.1", f"data.val_files={folder}/data.json"]
        long += ["trainer.test_freq=1", f"fsdp.reshard_after_forward={reshards}", "fsdp.strategy=fsdp2"]
        with patch.object(SFTEngine, "is_unsharded", return_value=False):  # as on one GPU
            assert run_here(*long, f"trainer.output_dir={folder}/resharding-{reshards}-1") == 0
        on_two_ranks.append([*long, f"trainer.output_dir={folder}/resharding-{reshards}-2"])
    assert run_here(*long, f"trainer.output_dir={folder}/unsharded-1") == 0
    (folder / "three.json").write_text(json.dumps(RECORDS[:1] * 3))  # two for one rank, one for the other
    uneven = [*base, f"data.train_files={folder}/three.json", "data.train_batch_size=3", "data.max_length=40"]
    for strategy in STRATEGIES:
        on_two_ranks.append([*uneven, f"fsdp.strategy={strategy}", f"trainer.output_dir={folder}/uneven-{strategy}-2"])
    assert run_here(*uneven, f"trainer.output_dir={folder}/uneven-1") == 0
    for arguments in on_two_ranks:
        end = warm.run(arguments, ranks=2)
        assert end.code == 0, end.output
    return folder


def model_of(folder, variant):
    return folder / ("untied_model" if variant in UNTIED else "model")


def plain_loss(model, tokenizer) -> torch.Tensor:
    """The mean over the tokens of all answers and their end tokens, one unpadded conversation at a time."""
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


def gradient_from(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The gradient that SGD with learning rate 1 has subtracted."""
    return before.float() - after.float()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("variant", ["full", "untied"])
def test_full_step_equals_a_plain_loop(work, tokenizer, variant, strategy, ranks):
    check_full(model_of(work, variant), tokenizer, work / f"{variant}-{strategy}-{ranks}")


@pytest.mark.parametrize("run", ["checkpointing", "offloading"])
def test_gradient_checkpointing_and_larger_packs_give_the_same_step(work, tokenizer, run):
    check_full(work / "model", tokenizer, work / f"{run}-fsdp2-1")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_without_supervised_tokens_gives_the_same_step(work, strategy):
    one_rank, two_ranks = work / "uneven-1", work / f"uneven-{strategy}-2"
    assert metrics(two_ranks)[0]["train/loss"] == pytest.approx(metrics(one_rank)[0]["train/loss"], rel=1e-6)
    weights = [load_file(run / "checkpoints/step_1/huggingface/model.safetensors") for run in (one_rank, two_ranks)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-6)


def test_one_rank_gives_the_same_losses_with_fsdp2_and_without(work):
    rows = metrics(work / "resharding-false-1"), metrics(work / "unsharded-1")
    losses = [[row[name] for row in run for name in ("train/loss", "train/grad_norm", "val/loss")] for run in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_stay_gathered_are_never_stale(work, ranks):
    gathered, resharded = (
        [
            (row["train/loss"], row["train/grad_norm"], row["val/loss"])
            for row in metrics(work / f"resharding-{value}-{ranks}")
        ]
        for value in ("false", "true")
    )
    assert gathered == resharded and len(gathered) == 3
    assert gathered[2][2] < gathered[1][2] < gathered[0][2]


def check_full(folder, tokenizer, output):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss = plain_loss(model, tokenizer)
    loss.backward()
    assert metrics(output)[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    before = dict(model.named_parameters())
    after = load_file(output / "checkpoints/step_1/huggingface/model.safetensors")
    assert after.keys() == before.keys()
    for name, parameter in before.items():
        torch.testing.assert_close(gradient_from(parameter.data, after[name]), parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("variant", "adapters"), [("lora", 14), ("lora_on_head", 3)])
def test_lora_step_equals_a_plain_peft_loop(work, tokenizer, variant, adapters, strategy, ranks):
    output = work / f"{variant}-{strategy}-{ranks}"
    adapter = output / "checkpoints/step_1/lora_adapter"
    base = AutoModelForCausalLM.from_pretrained(model_of(work, variant), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    # Training began with this A (its gradient is zero while B is) and with B = 0.
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


@pytest.fixture(scope="module")
def in_bf16(work, warm):
    """The losses and gradient norms of three steps in bf16: on one rank, and on two with FSDP2 and FSDP1."""
    folder = work / "bf16"
    arguments = [
        f"data.train_files={work}/data.json", f"data.cache_dir={work}/cache", f"model.path={work}/model", *COMMON,
        "fsdp.mixed_precision.param_dtype=bf16", "trainer.total_training_steps=3", "optim.lr=0.1",
    ]  # fmt: skip
    runs = {
        "one": [],
        "fsdp2": ["fsdp.strategy=fsdp2"],
        "fsdp": ["fsdp.strategy=fsdp"],
        "one fsdp": ["fsdp.strategy=fsdp"],
    }
    rows = {}
    for name, extra in runs.items():
        setup = ("tests.support.fsdp1:enable", {}) if name.endswith("fsdp") else None
        output = folder / name.replace(" ", "-")
        end = warm.run(
            [*arguments, *extra, f"trainer.output_dir={output}"], ranks=1 if "one" in name else 2, setup=setup
        )
        assert end.code == 0, end.output
        rows[name] = [(row["train/loss"], row["train/grad_norm"]) for row in metrics(output)]
    return rows


@pytest.mark.parametrize("name", ["fsdp2", "fsdp", "one fsdp"])
def test_bf16_steps_do_not_depend_on_ranks_and_strategy(in_bf16, name):
    """The number of supervised tokens is 121, and 1/121 is no number of bf16: it must not be rounded on its way."""
    for (loss, norm), (expected_loss, expected_norm) in zip(in_bf16[name], in_bf16["one"], strict=True):
        assert loss == pytest.approx(expected_loss, rel=2e-4)
        assert norm == pytest.approx(expected_norm, rel=1e-2)


@pytest.mark.parametrize("model", ["model", "untied_model"])
def test_frozen_weights_that_fsdp1_neither_shards_nor_casts_survive_backward_passes_and_saves(
    work, warm, tmp_path, model
):
    """As on one GPU with LoRA."""
    rows = []
    for name, setup in (("unsharded", None), ("fsdp1", ("tests.support.fsdp1:enable", {}))):
        end = warm.run(
            [
                f"data.train_files={work}/data.json", f"data.cache_dir={work}/cache", f"model.path={work}/{model}",
                *COMMON, "lora.enabled=true", "fsdp.strategy=fsdp", "data.max_length=128",  # two micro-batches
                "trainer.total_training_steps=3", "optim.lr=0.1", f"trainer.output_dir={tmp_path}/{name}",
            ],
            setup=setup,
        )  # fmt: skip
        assert end.code == 0, end.output
        rows.append([row[key] for row in metrics(tmp_path / name) for key in ("train/loss", "train/grad_norm")])
    assert len(rows[0]) == 6 and rows[1] == pytest.approx(rows[0], rel=1e-5)
    folders = [tmp_path / name / "checkpoints/step_3/huggingface" for name in ("unsharded", "fsdp1")]
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    assert adapters[0].keys() == adapters[1].keys()
    for name, weight in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [(1, []), pytest.param(2, ["fsdp.strategy=fsdp2"], marks=pytest.mark.slow), (2, ["lora.enabled=true"])],
)
def test_fp16_steps_are_those_of_fp32_and_resume_with_their_loss_scale(work, warm, tmp_path, ranks, extra):
    """Without a scale the gradients of this many tokens would be zero in fp16."""

    def run(name, *more):
        words = [
            f"data.train_files={work}/data.json", f"data.cache_dir={work}/cache", f"model.path={work}/model", *COMMON,
            f"trainer.output_dir={tmp_path}/{name}", "optim.lr=0.1", "optim.lr_scheduler_type=constant", *extra, *more,
        ]  # fmt: skip
        end = warm.run(words, ranks=ranks)
        assert end.code == 0, end.output
        return [(row["train/loss"], row["train/grad_norm"]) for row in metrics(tmp_path / name)]

    half = "fsdp.mixed_precision.param_dtype=fp16"
    exact = run("exact", "fsdp.mixed_precision.param_dtype=fp32", "trainer.total_training_steps=3")
    scaled = run("scaled", half, "trainer.total_training_steps=3")
    for (loss, norm), (expected_loss, expected_norm) in zip(scaled, exact, strict=True):
        assert loss == pytest.approx(expected_loss, rel=5e-3) and norm == pytest.approx(expected_norm, rel=3e-2)
    run("resumed", half, "trainer.total_training_steps=2")
    assert run("resumed", half, "trainer.total_training_steps=3", "trainer.resume_from=auto") == scaled
    manifest = json.loads((tmp_path / "resumed/checkpoints/step_3/manifest.json").read_text())
    assert manifest["loss_scale"] == [2.0**16, 3]
