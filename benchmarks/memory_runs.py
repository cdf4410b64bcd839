"""The runs of the memory table on CPUs: complete ones of ./train.sh, with evaluations and saves inside.

Each is measured in a folder below build/memory_table, which then holds only its result, so that a benchmark
that was interrupted goes on with the runs that are missing.
"""

import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers

from sft_recipe.config.compose import load_config
from sft_recipe.models.memory_estimate import MemoryEstimate, device_memory, estimate_run
from sft_recipe.models.resolve import resolve_model
from sft_recipe.models.stats import StatsOf
from sft_recipe.models.workload import Workload
from tests.support.tiny import build_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build/memory_table"
PACKAGED = "SmolLM2-135M-Instruct"
# The family, vocabulary, hidden and intermediate size, layers, heads, key-value heads, and whether the head is tied.
MODELS = {
    "Llama, 52M": ("Llama", 16384, 512, 1408, 12, 8, 4, False),
    "Llama, 95M": ("Llama", 32000, 768, 2048, 10, 12, 12, True),
    "Qwen2, 71M": ("Qwen2", 151936, 384, 1536, 6, 6, 2, True),
    "Qwen3, 110M": ("Qwen3", 49152, 640, 1920, 16, 10, 5, True),
    "Mistral, 74M": ("Mistral", 32000, 448, 1792, 14, 7, 7, False),
    "Qwen2, 32M": ("Qwen2", 8192, 320, 1280, 20, 5, 1, True),
    "Phi3, 88M": ("Phi3", 32064, 640, 1600, 10, 10, 10, False),
    "Llama, 159M": ("Llama", 32000, 896, 2560, 14, 14, 7, True),
    "Granite, 75M": ("Granite", 24576, 512, 1536, 16, 8, 4, False),
    "Olmo2, 85M": ("Olmo2", 50304, 512, 2048, 8, 8, 8, False),
    "Qwen3, 229M": ("Qwen3", 65536, 896, 3072, 16, 14, 7, True),
}
LORA, MERGED = ["lora.enabled=true"], ["lora.enabled=true", "lora.merge=true"]
CHECKPOINTING = ["model.enable_gradient_checkpointing=true"]
FP32 = ["fsdp.mixed_precision.param_dtype=fp32"]
BLOCKING = ["trainer.async_save=false"]


@dataclass(frozen=True)
class Run:
    """A run of `ranks` with micro-batches of `documents` x `length` tokens; `is_held_out` from fitting the estimate."""

    model: str
    length: int
    documents: int = 1
    ranks: int = 1
    overrides: tuple[str, ...] = ()
    is_held_out: bool = True

    @property
    def name(self) -> str:
        """Return a name for its folder: a digest of all that it measures."""
        settings = [self.model, self.length, self.documents, self.ranks, self.overrides, MODELS.get(self.model)]
        return hashlib.blake2b(repr(settings).encode(), digest_size=6).hexdigest()


def _run(model: str, length: int, *overrides: list[str], documents: int = 1, ranks: int = 1, fits: bool = False) -> Run:
    return Run(model, length, documents, ranks, tuple(word for words in overrides for word in words), not fits)


RUNS = [
    # With these the estimate was fitted ...
    _run("Mistral, 74M", 512, documents=2, ranks=2, fits=True),
    _run("Llama, 95M", 1024, LORA, ranks=2, fits=True),
    _run("Qwen2, 32M", 512, documents=4, ranks=2, fits=True),
    _run("Llama, 52M", 1024, ranks=2, fits=True),
    _run("Phi3, 88M", 512, LORA, ranks=2, fits=True),
    _run("Qwen3, 110M", 512, fits=True),
    _run("Qwen3, 110M", 1024, LORA, fits=True),
    _run("Mistral, 74M", 2048, fits=True),
    _run("Llama, 52M", 1024, FP32, fits=True),
    _run("Llama, 52M", 256, MERGED, fits=True),
    _run("Qwen2, 32M", 2048, LORA, fits=True),
    _run("Qwen2, 71M", 256, fits=True),
    # ... and these judge it.
    _run("Llama, 159M", 1024),
    _run("Granite, 75M", 1024, ranks=2),
    _run("Olmo2, 85M", 512, LORA, ranks=2),
    _run("Llama, 159M", 1024, LORA),
    _run("Granite, 75M", 2048),
    _run("Qwen3, 110M", 512, ranks=2),
    _run("Qwen3, 229M", 256, LORA, ranks=2),
    _run("Olmo2, 85M", 512, documents=2),
    _run("Llama, 95M", 256, MERGED),
    _run("Phi3, 88M", 256, documents=2, ranks=2),
    _run(PACKAGED, 1024),
    _run("Qwen2, 71M", 2048, LORA, ranks=2),
    _run("Granite, 75M", 4096, LORA),
    _run("Llama, 159M", 256, ranks=2),
    _run("Qwen2, 71M", 1024, documents=2),
    _run(PACKAGED, 2048, LORA),
    _run("Mistral, 74M", 1024, MERGED, ranks=2),
    _run("Qwen3, 229M", 512, LORA),
    _run("Olmo2, 85M", 512, MERGED),
    _run(PACKAGED, 256, ranks=2),
    _run("Llama, 52M", 4096),
    _run("Qwen2, 32M", 4096, LORA, ranks=2),
    _run("Qwen3, 229M", 256),
    _run("Llama, 95M", 512, BLOCKING),
    _run("Phi3, 88M", 2048, CHECKPOINTING),
    _run("Mistral, 74M", 512, FP32),
]


def measured(run: Run) -> dict[str, Any]:
    """Return what the run measured: its `peak` in bytes, and its `longest` example. Raises RuntimeError if it fails."""
    result = RESULTS / f"{run.name}.json"
    if not result.is_file():
        folder = RESULTS / run.name
        shutil.rmtree(folder, ignore_errors=True)
        _train(run, folder)
        facts = json.loads((folder / "run/run.json").read_text())
        lengths = json.loads((folder / "run/data.json").read_text())["lengths"]
        found = asdict(run) | {"peak": int(facts["peak_memory_gb"] * 2**30), "longest": lengths["max"]}
        result.write_text(json.dumps(found))
        shutil.rmtree(folder)
    return json.loads(result.read_text())


def predicted(run: Run, longest: int) -> tuple[MemoryEstimate, bool]:
    """Return the estimate for a run whose longest example has so many tokens, and whether it recomputes activations."""
    config = load_config(_words(run, RESULTS))
    stats = StatsOf(resolve_model(config.model, config.cache_dir()), "cpu")(config)
    estimate = estimate_run(config, stats, Workload(longest, longest), "cpu", device_memory("cpu") // run.ranks)
    return estimate, config.model.enable_gradient_checkpointing is True


def _train(run: Run, folder: Path) -> None:
    folder.mkdir(parents=True)
    _write_data(folder / "train.jsonl", 2 * _batch_size(run), run.length, seed=1)
    _write_data(folder / "val.jsonl", run.ranks, run.length, seed=2)
    words = [*_words(run, folder), f"data.train_files={folder}/train.jsonl", f"data.val_files={folder}/val.jsonl"]
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([ROOT / "train.sh", *words], env=environment, capture_output=True, text=True, cwd=ROOT)
    (RESULTS / f"{run.name}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"{run} failed: {(done.stderr or done.stdout).strip()[-500:]}")


def _words(run: Run, folder: Path) -> list[str]:
    """Two steps, on several ranks of two micro-batches, a save that overlaps with the second, and two evaluations."""
    return [
        f"model.path={_model(run.model)}", f"data.max_length={run.length}", "trainer.device=cpu",
        f"data.micro_batch_size_per_gpu={run.documents}", f"trainer.n_gpus_per_node={run.ranks}",
        f"data.train_batch_size={_batch_size(run)}", f"data.cache_dir={folder}/cache",
        f"trainer.output_dir={folder}/run", "trainer.total_training_steps=2", "trainer.save_freq=1",
        "trainer.test_freq=2", "trainer.logger=[console]", *run.overrides,
    ]  # fmt: skip


def _batch_size(run: Run) -> int:
    return run.documents * run.ranks * min(run.ranks, 2)


def _model(name: str) -> str:
    """Return the path of a model with random weights, which is built once, or the name of the packaged one."""
    if name == PACKAGED:
        return name
    folder = RESULTS / name.replace(", ", "-")
    if not (folder / "config.json").is_file():
        tokenizer = build_tokenizer()
        transformers.set_seed(0)
        model: Any = getattr(transformers, f"{MODELS[name][0]}ForCausalLM")(model_config(*MODELS[name]))
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def model_config(
    family: str,
    vocabulary: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    keys: int,
    is_tied: bool,
    head_size: int | None = None,
) -> Any:
    """Return the configuration of a model of that shape; heads divide the hidden size unless `head_size` is given."""
    return getattr(transformers, f"{family}Config")(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, tie_word_embeddings=is_tied,
        head_dim=head_size or hidden // heads,
        max_position_embeddings=32768, pad_token_id=0, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip


def _write_data(path: Path, count: int, length: int, seed: int) -> None:
    """Write conversations whose tokens nearly fill `length`: the words are of one token each in both tokenizers."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            words = "".join(draw.choice("0123456789") for _ in range(math.floor(0.97 * length) - 40))
            record = {"prompt": words[: length // 8], "response": words[length // 8 :]}
            file.write(json.dumps(record) + "\n")
