"""Trains a tiny random model of each causal architecture of transformers, and compares it with a plain loop.

    python -m benchmarks.architectures                         all of them, and writes docs/architectures.md
    python -m benchmarks.architectures --only llama gpt_oss    some

Each is trained for one step with full fine-tuning and with LoRA, packed, in fp32 on one CPU rank. The plain loop runs
the transformers model with eager attention, one unpadded document at a time. Compared are the loss of the step, and the
validation loss after it with that of the saved folder (the merged one with LoRA).
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.support import tiny
from tests.support.plain import plain_loss
from tests.support.runs import metrics, run_here

PAGE = Path(__file__).resolve().parents[1] / "docs/architectures.md"
LARGEST = 20_000_000  # parameters: some configurations cannot be made small with SIZES
NOT_TEXT = ("moshi", "xmod")  # of speech, and of languages that must be chosen
SAME = 1e-4  # the largest relative difference of two losses in fp32
# Values for those names that a configuration has; windows and chunks are shorter than the documents.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "vocab_size", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_key_value_heads"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "bos_token_id"), 1),
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=16),
    "mamba2": dict(num_heads=4, head_dim=32, n_groups=1),
    "dots1": dict(n_shared_experts=1),
}
RECORDS = [
    {"prompt": "Hello there, how are you?", "response": "I am fine, thank you."},
    {"prompt": "What is the capital of France?", "response": "Paris."},
    {"prompt": "What is the capital of France?", "response": "Paris, which lies on the Seine. " * 4},
    {"prompt": "1 2 3", "response": "4 5 6 7 8 9 0"},
    {"prompt": "def add(a, b):", "response": "    return a + b\n" * 12},
]
METHODS = {"full": [], "lora": ["lora.enabled=true", "lora.merge=true"]}


@dataclass
class Result:
    """What was found for one architecture: `differences` by method, of the step's loss and of the saved folder's."""

    name: str
    model_class: str
    differences: dict[str, tuple[float, float]]
    refusal: str = ""
    failure: str = ""

    @property
    def is_right(self) -> bool:
        """Return whether all losses were those of the plain loop."""
        found = [number for pair in self.differences.values() for number in pair]
        return len(self.differences) == len(METHODS) and all(number <= SAME for number in found)


def tiny_config(name: str) -> PretrainedConfig | None:
    """Return a small configuration of this model type, None where SIZES do not make it small or do not fit it."""
    config_class: Any = CONFIG_MAPPING[name]
    try:
        default = config_class()
        known = default.to_dict()
        names = {key: default.attribute_map.get(key, key) for key in SIZES}
        values = {names[key]: value for key, value in SIZES.items() if names[key] in known}
        values |= {key: 0.0 for key in known if ("drop" in key or "jitter" in key) and isinstance(known[key], float)}
        if "kv_lora_rank" in known:
            values |= {"num_key_value_heads": SIZES["num_attention_heads"], "head_dim": SIZES["qk_rope_head_dim"]}
        if known.get("layer_types"):
            kinds = list(dict.fromkeys(known["layer_types"]))[:2]
            values["layer_types"] = (kinds * 2)[:2]
        config = config_class(**{**values, **SPECIAL.get(name, {})})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:
        return None
    count = sum(parameter.numel() for parameter in model.parameters())
    return config if count <= LARGEST and not config.is_encoder_decoder else None


def build(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Save a model with random weights and its tokenizer; returns the name of its class."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3)  # attention is far from uniform, so that wrong masks show
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return type(model).__name__


def examine(name: str, config: PretrainedConfig, folder: Path) -> Result:
    """Train one architecture by each method; `folder` gets model, data and runs."""
    result = Result(name, "", {})
    try:
        _examine(result, config, folder)
    except Exception as error:
        print(traceback.format_exc(), file=sys.__stderr__)
        result.failure = f"{type(error).__name__}: {error}"
    return result


def _examine(result: Result, config: PretrainedConfig, folder: Path) -> None:
    tokenizer = tiny.build_tokenizer()
    (folder / "data.json").write_text(json.dumps(RECORDS))
    result.model_class = build(config, tokenizer, folder / "model")
    first = plain_loss(folder / "model", RECORDS)
    for method, extra in METHODS.items():
        run = folder / method
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = run_here(*_settings(folder), f"trainer.output_dir={run}", *extra)
        if code:
            errors = [line for line in output.getvalue().splitlines() if line.startswith("error: ")]
            result.refusal = errors[-1].removeprefix("error: ") if errors else output.getvalue()[-300:]
            result.refusal = result.refusal.replace(str(folder), "")
            return
        [row] = metrics(run)
        saved = plain_loss(run / "checkpoints/step_1/huggingface", RECORDS)
        result.differences[method] = abs(row["train/loss"] / first - 1), abs(row["val/loss"] / saved - 1)


def _settings(folder: Path) -> list[str]:
    return [
        f"model.path={folder}/model", f"data.cache_dir={folder}/cache", "trainer.device=cpu",
        f"data.train_files={folder}/data.json", f"data.val_files={folder}/data.json", "data.train_batch_size=5",
        "data.micro_batch_size_per_gpu=2", "data.max_length=192", "optim.lr=3e-3", "trainer.total_training_steps=1",
        "optim.lr_scheduler_type=constant", "optim.lr_warmup_steps_ratio=0", "fsdp.mixed_precision.param_dtype=fp32",
    ]  # fmt: skip


def results(names: list[str]) -> Iterator[Result]:
    """Examine the model types `names`, without those that cannot be made small."""
    for name in track(names, "Architectures"):
        config = None if name in NOT_TEXT else tiny_config(name)
        if config is not None:
            with tempfile.TemporaryDirectory() as folder:
                yield examine(name, config, Path(folder))


def page(found: list[Result]) -> str:
    """Return docs/architectures.md."""
    right, refused = ([r for r in found if r.is_right], [r for r in found if r.refusal])
    rows = [
        f"| `{r.name}` | {r.model_class} | "
        + " | ".join(f"{n:.0e}" for pair in r.differences.values() for n in pair)
        + " |"
        for r in right
    ]
    lines = [
        "# Architectures",
        "",
        "Written by `python -m benchmarks.architectures`, which trains a tiny random model of each causal",
        f"architecture of transformers {transformers.__version__} for one step, packed, and compares with transformers",
        "alone: eager attention, one document at a time, fp32. The columns show relative differences: of the loss of",
        "the step from that of the plain loop, and of the validation loss after it from that of the saved folder,",
        "loaded by the plain loop.",
        "",
        f"{len(right)} architectures give the losses of the plain loop with full fine-tuning and with LoRA (merged):",
        "",
        "| model type | class | full: loss | full: saved | LoRA: loss | LoRA: merged |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "These are refused before training:",
        "",
        "| model type | message |",
        "|---|---|",
        *(f"| `{r.name}` | {r.refusal} |" for r in refused),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the command; returns 1 where a loss differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="model types of transformers, such as llama")
    chosen = parser.parse_args().only
    unknown = set(chosen or ()) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if unknown:
        parser.error(f"transformers has no causal language model for {', '.join(sorted(unknown))}")
    found = []
    for result in results(chosen or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        found.append(result)
        numbers = ", ".join(
            f"{method}: loss {loss:.0e}, saved {saved:.0e}" for method, (loss, saved) in result.differences.items()
        )
        verdict = "ok" if result.is_right else "refused" if result.refusal else "WRONG"
        print(verdict, result.name, result.model_class, numbers, result.refusal, result.failure, flush=True)
    if not chosen:
        PAGE.write_text(page(found))
    return int(any(not result.is_right and not result.refusal for result in found))


if __name__ == "__main__":
    sys.exit(main())
