"""What is trained: the jobs, their data in the forms that the systems read, and the model as a plain folder."""

import json
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from benchmarks.speed.inside.chatml import encode
from sft_recipe.data.formats import read_conversations
from sft_recipe.models.flops import MatmulParams, matmul_params
from sft_recipe.models.gguf import convert_gguf, embedded_gguf
from sft_recipe.models.memory_estimate import ModelDims

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CONTEXT = 700, 1400  # tokens of a long prompt's context: least and most
SHORT_ANSWER = 40  # tokens at most
LONG_ROWS = 128  # at most; fewer where the data holds no more contexts
VALIDATION_ROWS = 99

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Lora:
    rank: int
    alpha: int


@dataclass(frozen=True)
class Job:
    """`batch_size` examples a step, each of up to `max_length` tokens; `rows` of them, or so many long prompts."""

    name: str
    title: str
    batch_size: int = 16
    max_length: int = 512
    rows: int = 256
    long: bool = False
    lora: Lora | None = None
    model: str = "SmolLM2-135M-Instruct"
    device: str = "cpu"
    weights: str = "fp32"  # master weights; frozen ones with LoRA
    compute: str = "bf16"  # in which numbers it computes: those that the hardware multiplies fast
    lr: float = 2e-5
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 42

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


SMALL_LORA, LARGE_LORA = Lora(8, 16), Lora(16, 32)
GPU = dict(device="cuda", batch_size=64, max_length=1024, rows=896)
JOBS = {
    "cpu": {
        job.name: job
        for job in (
            Job("full", "Full fine-tuning"),
            Job("long", "Long prompts, short answers", batch_size=8, max_length=1536, rows=LONG_ROWS, long=True),
            Job("lora", "LoRA, rank 8", lora=SMALL_LORA),
            Job("epoch", "Full fine-tuning, a whole epoch, and the loss on other rows after it"),
            Job("ranks", "Two ranks of one thread each, beside one rank of two threads"),
        )
    },
    "cuda": {
        job.name: job
        for job in (
            Job("full", "Full fine-tuning of 1.5 billion parameters", model="Qwen2.5-1.5B", **GPU),
            Job("lora", "LoRA of 7 billion parameters", model="Qwen2.5-7B", lora=LARGE_LORA, weights="bf16", **GPU),
        )
    },
}
SHAPES: dict[str, dict[str, Any]] = {  # of models with random weights: speed does not depend on what they know
    name: dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=28, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, tie_word_embeddings=is_tied,
    )
    for name, hidden, intermediate, heads, groups, vocabulary, is_tied in (
        ("Qwen2.5-1.5B", 1536, 8960, 12, 2, 151936, True),
        ("Qwen2.5-7B", 3584, 18944, 28, 4, 152064, False),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """Token counts of a job's rows: supervised text ends with <|im_end|>; pairs are those of causal attention."""

    rows: int
    tokens: int
    supervised: int
    answers: int  # rows with supervised tokens
    pairs: int


@dataclass(frozen=True)
class Data:
    """Folder of train.jsonl, train.parquet and validation.jsonl, and what is in the first."""

    folder: Path
    counts: Counts


def make_data(job: Job, records: Path, tokenizer: Tokenizer, folder: Path) -> Data:
    """Write the job's rows under `folder`: `records` is a file in any format that the recipe reads."""
    turns = read_turns(records)
    train = long_prompts(turns, job.rows, tokenizer, job.seed) if job.long else turns[: job.rows]
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "validation.jsonl", turns[-VALIDATION_ROWS:])
    _write_lines(folder / "train.jsonl", train)
    pq.write_table(pa.Table.from_pylist([{"messages": one} for one in train]), folder / "train.parquet")
    return Data(folder, count(train, tokenizer, job.max_length))


def read_turns(records: Path) -> list[Turns]:
    """The conversations of one question and one answer, the system's turn written out."""
    conversations = []
    for conversation in read_conversations(records):
        turns = [{"role": turn.role, "content": turn.content} for turn in conversation.messages]
        if turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": SYSTEM})
        if [turn["role"] for turn in turns[1:]] == ["user", "assistant"]:
            conversations.append(turns)
    return conversations


def long_prompts(conversations: list[Turns], rows: int, tokenizer: Tokenizer, seed: int) -> list[Turns]:
    """Questions with a short answer, each after a context of other conversations that no other row has.

    There are fewer than `rows` where the conversations do not suffice.
    """
    rng = random.Random(seed)
    drawn = rng.sample(conversations, len(conversations))
    short = [turns for turns in drawn if _length(tokenizer, turns[-1]["content"]) <= SHORT_ANSWER]
    asked = short[:rows]
    texts = {_as_text(turns): None for turns in drawn if turns not in asked}
    pool = [(text, _length(tokenizer, text)) for text in texts]
    made = []
    for *_, question, answer in asked:
        context, length = _draw(pool, rng.randint(sum(CONTEXT) // 2, CONTEXT[1]))
        if length < CONTEXT[0]:
            break
        prompt = f"Earlier conversations:\n\n{context}Now answer this:\n{question['content']}"
        made.append([{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}, answer])
    return made


def _draw(pool: list[tuple[str, int]], budget: int) -> tuple[str, int]:
    """Take whole texts off the pool, as they fit into so many tokens; returns them in one, and their tokens."""
    taken, length = [], 0
    for text, tokens in list(pool):
        if length + tokens <= budget:
            pool.remove((text, tokens))
            taken.append(text)
            length += tokens
            if length + SHORT_ANSWER > budget:
                break
    return "".join(taken), length


def count(rows: Iterable[Turns], tokenizer: Tokenizer, max_length: int) -> Counts:
    """What training on these rows is, each cut at `max_length` on the right."""
    lengths, supervised = [], []
    for turns in rows:
        prompt, answer = encode(tokenizer, turns)
        whole = len(prompt) + len(answer) + 1  # and the line break that ends the template
        lengths.append(min(whole, max_length))
        supervised.append(max(0, min(len(answer), max_length - len(prompt))))
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return Counts(len(lengths), sum(lengths), sum(supervised), sum(part > 0 for part in supervised), pairs)


def plain_model(name: str, folder: Path, cache: Path) -> Path:
    """The model as a folder that every system reads alike, old and new versions of transformers among them.

    The embedded one's weights are widened to fp32: some systems save in the dtype that they found.
    """
    target = folder / name
    if (target / "config.json").is_file():
        return target
    source = convert_gguf(embedded_gguf(), cache)
    partial = folder / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(source / file, partial)
    tokens = {"bos_token": "<|im_start|>", "unk_token": "<|endoftext|>"} | dict.fromkeys(
        ("eos_token", "pad_token"), "<|im_end|>"
    )
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    about |= {"chat_template": (source / "chat_template.jinja").read_text()}
    _write(partial / "tokenizer_config.json", tokens | about)
    if name in SHAPES:
        write_random_model(SHAPES[name], partial)
    else:
        weights = {name: part.float() for name, part in load_file(source / "model.safetensors").items()}
        save_file(weights, partial / "model.safetensors", {"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        changes = {"rope_theta": config["rope_parameters"]["rope_theta"], "dtype": "float32"}
        _write(partial / "config.json", config | changes)
    partial.rename(target)
    return target


def write_random_model(shape: dict[str, Any], folder: Path) -> None:
    """A model of Qwen2.5's kind with random weights, in bfloat16."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(**shape, rope_theta=1e6, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def products_of(folder: Path, lora_rank: int = 0) -> MatmulParams:
    """Of the model in a folder, with adapters on all linear layers but the head where `lora_rank` is not 0."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head, layout = model.get_output_embeddings(), ModelDims.of(config.to_dict())
    assert layout is not None
    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]
    adapters = sum(lora_rank * (part.in_features + part.out_features) for part in linear)
    return MatmulParams.of(layout, matmul_params(model, layout), adapters)


def _as_text(turns: Sequence[dict[str, str]]) -> str:
    question, answer = turns[-2:]
    return f"Question: {question['content']}\nAnswer: {answer['content']}\n\n"


def _length(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def _write_lines(path: Path, rows: Iterable[Turns]) -> None:
    lines = (json.dumps({"messages": turns}, ensure_ascii=False) + "\n" for turns in rows)
    path.write_text("".join(lines), encoding="utf-8")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
