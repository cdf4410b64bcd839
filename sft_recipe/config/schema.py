"""Every key of the configuration: its type, its check; what is unknown or wrong is told with the nearest right name."""

import difflib
import os
import re
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sft_recipe.errors import ConfigError

AFTER_EACH_EPOCH: Literal["after_each_epoch"] = "after_each_epoch"
# Names of flags that resemble their key too little to be found by spelling.
FLAG_NAMES = {
    "model": "model.path",
    "train_data": "data.train_files",
    "val_data": "data.val_files",
    "learning_rate": "optim.lr",
    "num_epochs": "trainer.total_epochs",
    "epochs": "trainer.total_epochs",
    "grad_clip": "optim.clip_grad",
    "n_gpus": "trainer.n_gpus_per_node",
    "use_lora": "lora.enabled",
    "merge_lora": "lora.merge",
}
StepInterval = int | Literal["after_each_epoch"]
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)  # in a variable's name
SHORTEST_SECRET = 8  # characters; shorter values (true, 0) would be found everywhere


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, protected_namespaces=())


class ModelConfig(_Group):
    """Which model is trained; see conf/model/default.yaml for the meaning of each key."""

    path: str
    fallback: str | None = None
    tokenizer_path: str | None = None
    trust_remote_code: bool = False
    enable_gradient_checkpointing: bool | Literal["auto"] = "auto"
    attn_implementation: str = "auto"
    share_prefixes: bool | Literal["auto"] = "auto"
    chat_template: str | None = None
    override_config: dict[str, Any] = {}


class DataConfig(_Group):
    """What is trained on; see conf/data/default.yaml."""

    train_files: str | list[str]
    val_files: str | list[str] | None = None
    val_ratio: float = Field(0.0, ge=0.0, lt=1.0)
    format: Literal[
        "auto",
        "preference",
        "messages",
        "conversations",
        "prompt_response",
        "prompt_completion",
        "query_response",
        "alpaca",
    ] = "auto"
    columns: dict[str, str] = {}
    on_bad_record: Literal["error", "skip"] = "error"
    max_bad_ratio: float = Field(0.05, ge=0.0, le=1.0)
    train_on: Literal["all", "last"] = "all"
    train_on_reasoning: bool = True
    enable_thinking: bool | None = None
    parse_special_tokens: bool = False
    max_length: int = Field(2048, ge=2)
    truncation: Literal["drop", "right", "error"] = "drop"
    train_batch_size: int = Field(4, ge=1)
    micro_batch_size_per_gpu: int = Field(1, ge=1)
    shuffle: bool = True
    num_workers: int | None = Field(None, ge=1)
    cache_dir: str | None = None

    @model_validator(mode="after")
    def _one_source_of_validation(self) -> "DataConfig":
        if self.val_files and self.val_ratio:
            raise ValueError("val_files and val_ratio are both set; validation data comes from one of them")
        return self

    @property
    def token_budget(self) -> int:
        """The most tokens that one micro-batch may hold."""
        return self.micro_batch_size_per_gpu * self.max_length


class OptimConfig(_Group):
    """The optimiser and its schedule; see conf/optim/default.yaml."""

    optimizer: str = "AdamW"
    optimizer_impl: str = "torch.optim"
    override_optimizer_config: dict[str, Any] | None = None
    lr: float = Field(2e-5, gt=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_steps_ratio: float = Field(0.1, ge=0, le=1)
    lr_warmup_steps: int = -1
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    clip_grad: float = Field(1.0, gt=0)


class MixedPrecisionConfig(_Group):
    """In which precision the model computes and reduces."""

    param_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    reduce_dtype: Literal["bf16", "fp32"] = "fp32"


class FsdpConfig(_Group):
    """How the model is spread over ranks; see conf/fsdp/default.yaml."""

    strategy: Literal["fsdp", "fsdp2", "megatron"] = "fsdp"
    param_offload: bool = False
    optimizer_offload: bool = False
    offload_policy: bool = False
    reshard_after_forward: bool | Literal["auto"] = "auto"
    fsdp_size: int = -1
    forward_prefetch: bool = False
    use_no_sync_for_gradient_accumulation: bool = True
    model_dtype: Literal["fp32", "bf16"] = "fp32"
    mixed_precision: MixedPrecisionConfig = MixedPrecisionConfig()
    ulysses_sequence_parallel_size: int = Field(1, ge=1)
    tensor_model_parallel_size: int = Field(1, ge=1)
    pipeline_model_parallel_size: int = Field(1, ge=1)
    context_parallel_size: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _keys_fit_the_strategy(self) -> "FsdpConfig":
        megatron_only = ["tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"]
        wrong = [key for key in megatron_only if getattr(self, key) > 1]
        if wrong and self.strategy != "megatron":
            raise ValueError(f"{wrong[0]} is for strategy=megatron; {self.strategy} has no such parallelism")
        if self.fsdp_size == 0 or self.fsdp_size < -1:
            raise ValueError(f"fsdp_size is {self.fsdp_size}; it is a number of ranks, or -1 for all")
        if self.offload_policy and self.strategy != "fsdp2":
            raise ValueError("offload_policy is for strategy=fsdp2; use param_offload and optimizer_offload")
        if self.ulysses_sequence_parallel_size > 1 and self.strategy == "megatron":
            raise ValueError("ulysses_sequence_parallel_size is for FSDP; megatron has context_parallel_size")
        return self


class LoraConfig(_Group):
    """Low-rank adapters; see conf/lora/default.yaml."""

    enabled: bool = False
    rank: int = Field(8, ge=1)
    alpha: float = Field(16, gt=0)
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    merge: bool = False

    @model_validator(mode="after")
    def _merge_needs_lora(self) -> "LoraConfig":
        if self.merge and not self.enabled:
            raise ValueError("merge is set but LoRA is not enabled; add --use_lora")
        return self


class TrainerConfig(_Group):
    """The run: how long, where to, on how many machines; see config.yaml."""

    total_epochs: int = Field(3, ge=1)
    total_training_steps: int | None = Field(None, ge=1)
    output_dir: str = "./outputs"
    resume_from: str | None = None
    save_freq: StepInterval = AFTER_EACH_EPOCH
    test_freq: StepInterval = AFTER_EACH_EPOCH
    max_ckpt_to_keep: int | None = Field(2, ge=1)
    async_save: bool = True
    max_time: float | None = Field(None, gt=0)
    auto_restart: int = Field(0, ge=0)
    heartbeat_timeout: float | None = Field(1800, gt=0)
    logger: list[str] = ["console"]
    project_name: str = "sft_recipe"
    experiment_name: str | None = None
    wandb_project: str | None = None
    seed: int = Field(42, ge=0)
    device: Literal["auto", "cuda", "cpu"] = "auto"
    n_gpus_per_node: int = Field(1, ge=1)
    nnodes: int = Field(1, ge=1)
    node_rank: int = Field(0, ge=0)
    master_addr: str = "localhost"
    master_port: int | None = Field(None, ge=1, le=65535)

    @model_validator(mode="after")
    def _nodes(self) -> "TrainerConfig":
        if self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank is {self.node_rank}; with nnodes={self.nnodes} it ends at {self.nnodes - 1}")
        if self.nnodes > 1 and self.master_addr == "localhost":
            raise ValueError("several machines need master_addr, the address of machine 0, the same on all of them")
        return self

    @property
    def run_folder(self) -> Path:
        """`output_dir`, with ~ as the home folder."""
        return Path(self.output_dir).expanduser()

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.n_gpus_per_node * self.nnodes


class Config(_Group):
    """The whole tree, checked."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    fsdp: FsdpConfig
    lora: LoraConfig
    trainer: TrainerConfig = Field(default_factory=lambda: TrainerConfig.model_validate({}))

    def public(self) -> dict[str, Any]:
        """The tree as others may see it, in files and loggers: no secret of the environment stands in it."""
        return without_secrets(self.model_dump(mode="json"))

    def cache_dir(self) -> Path:
        """Where token stores and converted models are kept between runs."""
        if self.data.cache_dir:
            return Path(self.data.cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sft_recipe"


def without_secrets(tree: Any) -> Any:
    """A tree of plain values in which ${oc.env:NAME} stands for what variables with a secret's name hold."""
    if isinstance(tree, dict):
        return {key: without_secrets(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_secrets(value) for value in tree]
    if isinstance(tree, str):
        for name, value in os.environ.items():
            if SECRET.search(name) and len(value) >= SHORTEST_SECRET:
                tree = tree.replace(value, f"${{oc.env:{name}}}")
    return tree


def build_config(tree: dict[str, Any]) -> Config:
    """Check a resolved tree and make it typed.

    Raises ConfigError that lists everything wrong at once, with the nearest right key or the accepted values.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = _explain_all(error.errors())
        number = "a mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise ConfigError("\n".join([f"the configuration has {number}:", *(f"  - {line}" for line in lines)])) from None


def nearest(name: str, known: list[str]) -> str:
    """' Did you mean X?', or nothing where no known name is near."""
    by_flag = {flag: key for flag, key in FLAG_NAMES.items() if key in known}
    leaves = by_flag | {key.rsplit(".", 1)[-1]: key for key in known}
    last = name.rsplit(".", 1)[-1]
    close = [leaves[last]] if last in leaves else difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close and (leaf := difflib.get_close_matches(last, leaves, n=1, cutoff=0.7)):
        close = [leaves[leaf[0]]]
    return f" Did you mean {close[0]}?" if close else ""


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of every key, groups not included."""
    keys = []
    for name, info in model.model_fields.items():
        nested = info.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            keys += all_keys(nested, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def text_keys() -> list[str]:
    """Dotted names of the keys that hold text, or several texts."""
    return [key for key in all_keys() if str in _types(key)]


def _types(key: str) -> tuple[Any, ...]:
    """The types that a key's value may have."""
    annotation: Any = Config
    for part in key.split("."):
        annotation = annotation.model_fields[part].annotation
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


def _explain_all(problems: list[Any]) -> list[str]:
    """One line a key: of a key with several types (steps, or a word) the last, the word, says most."""
    complaints: dict[str, list[str]] = {}
    for problem in problems:
        key = ".".join(str(part) for part in problem["loc"] if _is_key_part(part))
        complaints.setdefault(key, []).append(_explain(key, problem))
    return [key + texts[-1] for key, texts in complaints.items()]


def _explain(key: str, problem: Any) -> str:
    kind, given, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f" is not a key.{nearest(key, all_keys())}"
    if kind == "missing" and isinstance(problem["loc"][-1], int):
        return f" is {given!r}; it has too few values"
    if kind == "missing" and key in Config.model_fields:
        return " is not set: the defaults list of config.yaml must name this group"
    if kind == "missing":
        return " is not set"
    if kind == "model_type":
        return f" is {given!r}, but it is a group of keys"
    if kind == "value_error":
        return f": {context['error']}"
    if kind == "literal_error":
        expected = context["expected"].replace("'", "").replace(" or ", ", ")
        also = {AFTER_EACH_EPOCH: "a number of steps, ", "auto": "true, false, "}  # the other type of such a key
        expected = also.get(expected, "") + expected
        return f" is {given!r}; it must be one of {expected}.{nearest(str(given), expected.split(', '))}"
    return f" is {given!r}; {problem['msg'].replace('Input should', 'it should')}"


def _is_key_part(part: Any) -> bool:
    """pydantic adds the branch of a union that it tried (str, list[str], literal[...]) to the path of a key."""
    names, starts = ("str", "int", "bool", "float"), ("list[", "literal[", "dict[", "function-")
    return isinstance(part, str) and part not in names and not part.startswith(starts)
