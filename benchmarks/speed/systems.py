"""Who is compared: the configurations of each system on each job, and our own command line."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.speed.jobs import Job

OURS = "ours"
PEERS = {
    "hf": "transformers Trainer",
    "trl": "TRL",
    "llamafactory": "LLaMA-Factory",
    "torchtune": "torchtune",
    "verl": "verl",
}
LEFT_OUT = {  # by job and peer: why
    ("lora", "torchtune"): "torchtune has no single-device LoRA recipe that takes this model as it stands",
}


@dataclass(frozen=True)
class Configuration:
    """One way in which a system does a job. `micro_tokens`: the most tokens, padding included, computed at once."""

    system: str
    name: str
    micro_tokens: int
    environment: str = ""  # empty: our own
    runner: str = ""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    same_job: bool = True  # does not count as a system's fastest where it is not
    ranks: int = 1

    def __str__(self) -> str:
        return f"{PEERS.get(self.system, self.system)}, {self.name}"


def configurations(job: Job, peers: Iterable[str]) -> list[Configuration]:
    """Ours first, then each peer's."""
    if job.name == "ranks":
        budget = 2 * job.max_length
        return [
            Configuration("one rank", f"micro-batches of {budget:,} tokens", budget, options={"micro": 2}),
            Configuration(
                "two ranks", f"micro-batches of {budget:,} tokens each", budget, options={"micro": 2}, ranks=2
            ),
        ]
    own = (8,) if job.device == "cuda" else (1, 2) if job.long else (1, 4, 8)
    ours = [
        Configuration(OURS, f"micro-batches of {n * job.max_length:,} tokens", n * job.max_length, options={"micro": n})
        for n in own
    ]
    if job.name == "epoch":
        return [ours[1], *(one for one in _on_cpu(job) if one.system == "hf" and "hf" in peers)]
    make = _on_gpu if job.device == "cuda" else _on_cpu
    wanted = [peer for peer in peers if (job.name, peer) not in LEFT_OUT]
    return [*ours, *(one for one in make(job) if one.system in wanted)]


def _on_cpu(job: Job) -> list[Configuration]:
    few, many = (1, 2) if job.long else (1, 4)

    def padded(system: str, environment: str, version: str, examples: int, **options: Any) -> Configuration:
        by_length = ", by length" if examples > 1 else ""
        name = f"{version}, {job.compute}, {examples} {'examples' if examples > 1 else 'example'} at once{by_length}"
        options |= {"examples": examples}
        name += ", loss in chunks" if "loss" in options else ""
        return Configuration(system, name, examples * job.max_length, environment, f"run_{system}.py", options)

    chunked = {"loss": "chunked_nll"}
    packs = job.batch_size if job.long else -(-7 * job.batch_size // 16)  # a step: an epoch has as many steps
    packed = {"examples": 1, "packing": True, "accumulate": packs}
    verl_tokens = job.max_length if job.long else 2 * job.max_length
    return [
        *(padded("hf", "trl", "5.23.0", n) for n in ((few, many) if job.long else (many,))),
        *(padded("trl", "trl-1.10", "1.10.0", n, **chunked) for n in (few, many)),
        *([] if job.long else [padded("trl", "trl", "1.16.0", 2)]),
        Configuration(
            "llamafactory",
            f"0.9.5, {job.compute}, neat_packing into {job.max_length:,} tokens",
            job.max_length,
            "llamafactory",
            "run_llamafactory.py",
            packed,
        ),
        padded("llamafactory", "llamafactory", "0.9.5", many),
        *(
            Configuration(
                "torchtune",
                f"0.6.1, {name}, 1 example at once",
                job.max_length,
                "torchtune",
                "run_torchtune.py",
                {"examples": 1, "weights": weights},
                same_job=weights == "fp32",
            )
            for weights, name in (("fp32", "fp32"), ("bf16", "weights in bf16 (not the same job: updates are lost)"))
            if weights == "fp32" or job.compute == "bf16"
        ),
        Configuration(
            "verl",
            f"0.9.1, fsdp2, {job.compute}, micro-batches of {verl_tokens:,} tokens",
            verl_tokens,
            "verl",
            "run_verl.py",
        ),
    ]


def _on_gpu(job: Job) -> list[Configuration]:
    budget = 8 * job.max_length
    padded = {"examples": 8}
    packed = {"examples": 1, "packing": True, "accumulate": 2}
    return [
        Configuration("hf", "5.23.0, bf16, 8 examples at once, by length", budget, "trl", "run_hf.py", padded),
        Configuration("trl", "1.16.0, bf16, 8 examples at once, by length", budget, "trl", "run_trl.py", padded),
        Configuration("trl", f"1.16.0, bf16, packed into {budget:,} tokens", budget, "trl", "run_trl.py", packed),
        Configuration("verl", f"0.9.1, fsdp2, bf16, {budget:,} tokens at once", budget, "verl", "run_verl.py"),
    ]


def our_command(
    job: Job, configuration: Configuration, model: Path, data: Path, steps: int, out: Path
) -> Sequence[str]:
    """As a user would type it, after ./train.sh."""
    flags = {
        "model": model,
        "train_data": data,
        "max_length": job.max_length,
        "batch_size": job.batch_size,
        "micro_batch_size": configuration.options["micro"],
        "lr": job.lr,
        "warmup_ratio": 0,
        "weight_decay": job.weight_decay,
        "grad_clip": job.clip,
        "n_gpus": configuration.ranks,
        "output_dir": out,
    }
    if job.lora:
        flags |= {"use_lora": "true", "lora_rank": job.lora.rank, "lora_alpha": job.lora.alpha}
    overrides = {
        "optim.lr_scheduler_type": "constant",
        "data.truncation": "right",
        "trainer.total_training_steps": steps,
        "trainer.save_freq": -1,
        "trainer.seed": job.seed,
        "trainer.device": job.device,
        "fsdp.mixed_precision.param_dtype": job.compute,
        "fsdp.model_dtype": job.weights,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [*words, *(f"{key}={value}" for key, value in overrides.items())]


def fastest(speeds: dict[Configuration, float], system: str) -> Configuration | None:
    """Of a system's configurations that were measured and do the same job."""
    own = [one for one in speeds if one.system == system and one.same_job]
    return max(own, key=lambda one: speeds[one], default=None)
