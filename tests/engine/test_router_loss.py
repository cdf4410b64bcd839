"""The router's loss equals transformers' own of each layer, with its gradient, however a step is split."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from sft_recipe.data.batching import plan_micro_batches
from sft_recipe.engine.router_loss import router_coefficient, router_loss
from sft_recipe.errors import ModelError
from tests.support import tiny
from tests.support.runs import metrics, run_here

EXPERTS, TOP_K, COEFFICIENT, RATE = 4, 2, 0.5, 0.1
SIZES = dict(vocab_size=512, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=EXPERTS, num_experts_per_tok=TOP_K)
LENGTHS = [30, 11, 24, 7]
RECORDS = [
    {"input_ids": [(3 + 7 * i * (row + 1)) % 500 for i in range(length)], "loss_mask": [0] * 5 + [1] * (length - 5)}
    for row, length in enumerate(LENGTHS)
]


@pytest.mark.parametrize("top_k", [1, 2])
def test_loss_is_that_of_transformers_summed_over_layers(top_k):
    torch.manual_seed(0)
    layers = [torch.randn(9, EXPERTS, dtype=torch.float64) for _ in range(3)]
    expected = sum(load_balancing_loss_func((logits[:7].float(),), EXPERTS, top_k) for logits in layers)
    assert float(router_loss(layers, top_k, tokens=7)) == pytest.approx(float(expected), rel=1e-6)


def test_equal_use_of_experts_costs_the_number_of_choices():
    logits = 100 * torch.eye(EXPERTS)
    assert float(router_loss([logits, logits], 1, EXPERTS)) == pytest.approx(2.0)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("router")
    tiny.build_tokenizer().save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, router_aux_loss_coef=COEFFICIENT, pad_token_id=None, tie_word_embeddings=True)
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folder


def arguments(work, output, *extra):
    return [
        f"model.path={work}/model",
        f"data.train_files={work}/data.jsonl",
        f"data.cache_dir={work}/cache",
        "data.order=file",
        "data.max_length=40",
        f"trainer.output_dir={output}",
        "trainer.device=cpu",
        "trainer.total_training_steps=1",
        "fsdp.mixed_precision.param_dtype=fp32",
        "optim.optimizer=SGD",
        f"optim.lr={RATE}",
        "optim.lr_scheduler_type=constant",
        "optim.lr_warmup_steps_ratio=0",
        "optim.weight_decay=0",
        "optim.clip_grad=null",
        *extra,
    ]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def losses(model, ranks, budget):
    """Return both losses of the model; micro-batches as planned, each document by itself."""
    plan = plan_micro_batches(np.array(LENGTHS), ranks, budget)
    supervised = sum(sum(record["loss_mask"]) for record in RECORDS)
    nll = aux = 0.0
    for documents in [documents for share in plan for documents in share]:
        layers = [[] for _ in range(SIZES["num_hidden_layers"])]
        for index in documents:
            ids, mask = torch.tensor(RECORDS[index]["input_ids"]), torch.tensor(RECORDS[index]["loss_mask"])
            output = model.model(input_ids=ids[None], output_router_logits=True)
            logits = model.lm_head(output.last_hidden_state)[0, :-1]
            nll = nll + cross_entropy(logits[mask[1:] > 0], ids[1:][mask[1:] > 0], reduction="sum") / supervised
            for layer, router_logits in zip(layers, output.router_logits, strict=True):
                layer.append(router_logits)
        share = sum(LENGTHS[index] for index in documents) / sum(LENGTHS)
        of_layers = [load_balancing_loss_func((torch.cat(layer),), EXPERTS, TOP_K) for layer in layers]
        aux = aux + COEFFICIENT * share * sum(of_layers)
    return nll, aux


def reference(folder, ranks, budget):
    """Return both losses and the model after a step of SGD."""
    model = load(folder)
    nll, aux = losses(model, ranks, budget)
    (nll + aux).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= RATE * parameter.grad
    return float(nll), float(aux), model


@pytest.mark.parametrize(
    ("ranks", "micro_batch", "strategy"), [(1, 2, "fsdp2"), (1, 1, "fsdp2"), (2, 1, "fsdp2"), (2, 1, "fsdp")]
)
def test_step_trains_both_losses(warm, work, tmp_path, ranks, micro_batch, strategy):
    run = arguments(work, tmp_path / "out", f"data.micro_batch_size_per_gpu={micro_batch}", f"fsdp.strategy={strategy}")
    end = warm.run(run, ranks=ranks, setup=("tests.support.fsdp1:enable", {}) if strategy == "fsdp" else None)
    assert end.code == 0, end.output
    nll, aux, expected = reference(work / "model", ranks, 40 * micro_batch)
    [row] = metrics(tmp_path / "out")
    assert row["train/loss"] == pytest.approx(nll, rel=1e-5)
    assert row["train/aux_loss"] == pytest.approx(aux, rel=1e-5)
    folder = tmp_path / "out/checkpoints/step_1/huggingface"
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for (name, ours), theirs in zip(trained.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_adapters_train_both_losses(warm, work, tmp_path, ranks):
    """B is 0 before the step: A stays, and B becomes its gradient times -RATE."""
    lora = ["lora.enabled=true", "lora.rank=4", "lora.target_modules=[q_proj,v_proj]"]
    end = warm.run(arguments(work, tmp_path / "out", "data.micro_batch_size_per_gpu=1", *lora), ranks=ranks)
    assert end.code == 0, end.output
    adapter = tmp_path / "out/checkpoints/step_1/huggingface"
    model = PeftModel.from_pretrained(load(work / "model"), adapter, is_trainable=True)
    trained = {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_B" in name}
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.zero_()
    nll, aux = losses(model.get_base_model(), ranks, 40)
    (nll + aux).backward()
    [row] = metrics(tmp_path / "out")
    assert row["train/aux_loss"] == pytest.approx(float(aux), rel=1e-5)
    found = dict(model.named_parameters())
    assert trained and all(
        torch.allclose(value, -RATE * found[name].grad, rtol=1e-3, atol=1e-6) for name, value in trained.items()
    )
    [moved] = torch.autograd.grad(losses(model.get_base_model(), ranks, 40)[1], [found[min(trained)]])
    assert moved.abs().max() > 1e-5  # the router's loss alone has a part in it


def test_resumed_run_has_the_same_losses(work, tmp_path):
    settings = ["trainer.save_freq=1", "trainer.max_ckpt_to_keep=3", "data.train_batch_size=2"]
    settings += ["trainer.total_training_steps=3", "model.router_aux_loss_coef=0.25"]
    assert run_here(*arguments(work, tmp_path / "whole", *settings)) == 0
    first = tmp_path / "whole/checkpoints/step_1"
    assert run_here(*arguments(work, tmp_path / "resumed", *settings, f"trainer.resume_from={first}")) == 0
    keys = ("train/loss", "train/aux_loss", "train/grad_norm")
    rows = [[tuple(row[key] for key in keys) for row in metrics(tmp_path / part)] for part in ("whole", "resumed")]
    assert rows[0][1:] == rows[1] and len(rows[1]) == 2


@pytest.mark.parametrize("extra", [["model.enable_gradient_checkpointing=true"], ["model.share_prefixes=true"]])
def test_loss_is_the_same_with_checkpointing_and_where_prefixes_could_be_shared(work, tmp_path, extra):
    assert run_here(*arguments(work, tmp_path / "out", "data.micro_batch_size_per_gpu=2", *extra)) == 0
    _, aux, expected = reference(work / "model", 1, 80)
    [row] = metrics(tmp_path / "out")
    assert row["train/aux_loss"] == pytest.approx(aux, rel=1e-5)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out/checkpoints/step_1/huggingface", dtype=torch.float32)
    gate = "model.layers.0.mlp.gate.weight"
    assert torch.allclose(trained.state_dict()[gate], expected.state_dict()[gate], rtol=1e-5, atol=1e-7)


def test_coefficient_is_the_models_own_unless_it_is_set(work, model_dir):
    experts, dense = (AutoModelForCausalLM.from_pretrained(folder) for folder in (work / "model", model_dir))
    assert [router_coefficient(experts, wanted) for wanted in (None, 0.25, 0.0)] == [COEFFICIENT, 0.25, 0.0]
    assert [router_coefficient(dense, wanted) for wanted in (None, 0.0)] == [0.0, 0.0]
    with pytest.raises(ModelError, match="LlamaForCausalLM has no experts whose router can be read"):
        router_coefficient(dense, 0.25)


def test_coefficient_0_trains_without_the_loss(work, tmp_path):
    assert run_here(*arguments(work, tmp_path / "out", "model.router_aux_loss_coef=0")) == 0
    assert "train/aux_loss" not in metrics(tmp_path / "out")[0]


def test_dense_model_with_a_coefficient_is_refused(model_dir, work, tmp_path, capfd):
    extra = [f"model.path={model_dir}", "model.router_aux_loss_coef=0.1"]
    assert run_here(*arguments(work, tmp_path / "out", *extra)) == 2
    assert "set it to null" in capfd.readouterr().err
