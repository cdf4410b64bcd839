"""Encoder-decoder models: losses, gradient norms and weights against a plain transformers loop, one document at a time.

AdamW steps, so that an error in one gradient changes the following losses.
"""

import json
from itertools import product

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from sft_recipe.config.schema import ModelConfig
from sft_recipe.engine.cpu.platform import use_cpu
from sft_recipe.models.hf_config import load_hf_config
from sft_recipe.models.loading import load_model
from sft_recipe.models.resolve import ResolvedModel
from tests.support import seq2seq
from tests.support.runs import metrics, run_here

RECORDS = [
    {"prompt": "Hello there, how are you?", "response": "I am fine, thank you."},
    {"prompt": "What is the capital of France?", "response": "Paris."},
    {"prompt": "你好，今天天气怎么样？", "response": "很好，谢谢。" * 3},
    {"prompt": "def add(a, b):" * 3, "response": "    return a + b"},
    {"prompt": "1 2 3", "response": "4 5 6 7 8 9 0"},
]
KINDS = ["t5", "bart", "t5gemma2"]
UNTIED = ["flan", "untied"]
STEPS, RATE, CLIP = 3, 0.003, 0.5
COMMON = [
    "data.train_batch_size=5",
    "data.max_length=64",
    "data.micro_batch_size_per_gpu=2",
    f"optim.lr={RATE}",
    "optim.lr_scheduler_type=constant",
    "optim.lr_warmup_steps_ratio=0",
    f"optim.clip_grad={CLIP}",
    f"trainer.total_training_steps={STEPS}",
    "fsdp.mixed_precision.param_dtype=fp32",
    "trainer.device=cpu",
]
MODULES = ["q", "v", "wo", "q_proj", "v_proj", "fc1"]
DROPOUT = {"t5": ["model.override_config={dropout_rate: 0.1}"], "bart": ["model.override_config={dropout: 0.1}"]}
LORA = ["lora.enabled=true", "lora.merge=true", "lora.rank=4"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seq2seq")
    (folder / "data.json").write_text(json.dumps(RECORDS, ensure_ascii=False))
    for kind in KINDS:
        seq2seq.build_model(folder / kind, kind)
    flan = seq2seq.build_model(folder / "flan", "t5", tie_word_embeddings=False, feed_forward_proj="gated-gelu")
    seq2seq.write_untied_head(flan)
    seq2seq.write_untied_head(seq2seq.build_model(folder / "untied", "t5"))  # its config.json says that it is tied
    return folder


def arguments(work, kind, name, *extra):
    places = [f"model.path={work}/{kind}", f"data.train_files={work}/data.json", f"data.cache_dir={work}/cache"]
    return [*COMMON, *places, f"trainer.output_dir={work}/{name}", *extra]


def documents(folder, kind):
    """Source and target of each record; T5Gemma 2's decoder begins with <s>, so that its targets do not."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(text, begin):
        return [*begin, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    begin = [] if kind in ("t5", *UNTIED) else [tokenizer.bos_token_id]
    begin_target = begin if kind == "bart" else []
    return [(encode(record["prompt"], begin), encode(record["response"], begin_target)) for record in RECORDS]


def plain_steps(model, documents):
    """The loss and the gradient norm of each step; the documents of a batch are computed one at a time."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    count = sum(len(target) for _, target in documents)
    found = []
    for _ in range(STEPS):
        loss = 0.0
        for source, target in documents:
            part = model(input_ids=torch.tensor([source]), labels=torch.tensor([target])).loss * len(target) / count
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss, norm.item()))
    return found


def run(warm, arguments, ranks, strategy="fsdp2"):
    if ranks == 1:
        assert run_here(*arguments) == 0
    else:
        setup = ("tests.support.fsdp1:enable", {}) if strategy == "fsdp" else None
        end = warm.run(arguments, ranks=ranks, setup=setup)
        assert end.code == 0, end.output


def assert_same_steps(folder, expected):
    found = [(row["train/loss"], row["train/grad_norm"]) for row in metrics(folder)]
    assert torch.tensor(found).allclose(torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks, strategy", [(1, "fsdp2"), (2, "fsdp"), (2, "fsdp2")])
@pytest.mark.parametrize("kind", [*KINDS, *UNTIED])
def test_full_training_equals_a_plain_loop(work, warm, kind, ranks, strategy):
    name = f"{kind}-{strategy}-{ranks}"
    run(warm, arguments(work, kind, name, f"fsdp.strategy={strategy}"), ranks, strategy)
    model = AutoModelForSeq2SeqLM.from_pretrained(work / kind, dtype=torch.float32)
    assert_same_steps(work / name, plain_steps(model, documents(work / kind, kind)))
    trained = AutoModelForSeq2SeqLM.from_pretrained(work / f"{name}/checkpoints/step_{STEPS}/huggingface")
    for key, weight in model.state_dict().items():
        assert trained.state_dict()[key].allclose(weight, atol=1e-4), key
    config = json.loads((work / f"{name}/checkpoints/step_{STEPS}/huggingface/config.json").read_text())
    assert config.get("tie_word_embeddings", True) == (kind not in UNTIED)


@pytest.mark.parametrize("kind, ranks", [*product(KINDS, [1, 2]), ("untied", 1)])
def test_adapters_train_as_with_peft_alone(work, warm, kind, ranks):
    """From the adapters that the first step of a run with learning rate 0 has saved."""
    names = {name.rpartition(".")[2] for name, _ in AutoModelForSeq2SeqLM.from_pretrained(work / kind).named_modules()}
    modules = [module for module in MODULES if module in names]
    settings = [*LORA, f"lora.target_modules=[{','.join(modules)}]"]
    start, name = f"{kind}-start-{ranks}", f"{kind}-lora-{ranks}"
    run(warm, arguments(work, kind, start, *settings, "optim.lr=1e-30", "trainer.total_training_steps=1"), ranks)
    run(warm, arguments(work, kind, name, *settings), ranks)
    base = AutoModelForSeq2SeqLM.from_pretrained(work / kind, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, work / f"{start}/checkpoints/step_1/lora_adapter", is_trainable=True)
    assert adapted.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    assert_same_steps(work / name, plain_steps(adapted.eval(), documents(work / kind, kind)))
    merged = AutoModelForSeq2SeqLM.from_pretrained(work / f"{name}/checkpoints/step_{STEPS}/huggingface")
    expected = adapted.merge_and_unload().state_dict()
    for key, weight in merged.state_dict().items():
        assert weight.allclose(expected[key], atol=1e-4), key


@pytest.mark.parametrize("kind", [*KINDS, "untied"])
def test_a_resumed_run_is_the_run_that_never_stopped(work, kind):
    """Also with dropout, whose random numbers depend on the step."""
    settings = ["trainer.save_freq=1", "trainer.max_ckpt_to_keep=3", *DROPOUT.get(kind, [])]
    assert run_here(*arguments(work, kind, f"{kind}-whole", *settings)) == 0
    first = work / f"{kind}-whole/checkpoints/step_1"
    assert run_here(*arguments(work, kind, f"{kind}-resumed", *settings, f"trainer.resume_from={first}")) == 0
    weights = [
        load_file(work / f"{kind}-{part}/checkpoints/step_{STEPS}/huggingface/model.safetensors")
        for part in ("whole", "resumed")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    losses = [[row["train/loss"] for row in metrics(work / f"{kind}-{part}")] for part in ("whole", "resumed")]
    assert losses[0][1:] == losses[1]


@pytest.mark.parametrize(
    "kind, layers, head",
    [
        ("t5", ["T5Block"] * 4, []),
        ("untied", ["T5Block"] * 4, ["Linear"]),
        ("bart", ["BartEncoderLayer"] * 2 + ["BartDecoderLayer"] * 2, []),
    ],
)
def test_layers_are_the_units_of_fsdp_and_the_root_has_the_shared_embeddings(work, kind, layers, head):
    use_cpu()
    from verl.utils import fsdp_utils
    from verl.workers.engine.fsdp import transformer_impl

    from sft_recipe.engine import patches
    from sft_recipe.engine.seq2seq_engine import Seq2SeqEngine

    folder = work / kind
    config = load_hf_config(ModelConfig(path=str(folder)), ResolvedModel(folder, kind))
    model = load_model(folder, config, torch.float32)
    shared = Seq2SeqEngine._weights_of_root(None, model)
    assert {id(weight) for weight in shared} == {id(model.get_input_embeddings().weight)}
    with patches.keep_unwrapped(shared):
        units = fsdp_utils._select_fsdp2_wrap_targets(model, patches.layer_class_names(model))
        wraps = transformer_impl.get_fsdp_wrap_policy(module=model, config={}, is_lora=False)
    assert [type(unit).__name__ for unit in units] == layers + head
    assert [type(part).__name__ for part in model.modules() if wraps(part, False, nonwrapped_numel=0)] == layers
