"""One case of a rehearsal: builds the engine on GPUs that do not exist, and runs two steps."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from sft_recipe.config import preflight
from sft_recipe.config.compose import load_config
from sft_recipe.config.schema import Config
from sft_recipe.engine.rehearsal.device import FakeGpu, install
from sft_recipe.engine.rehearsal.memory import DeviceMemory
from sft_recipe.engine.rehearsal.packed import pack_linear_layers
from sft_recipe.models.families import SEQ2SEQ, Family, family_of, fit
from sft_recipe.models.hf_config import load_hf_config
from sft_recipe.models.loading import build_model
from sft_recipe.models.workload import Workload

STEPS = 2  # the first one makes the optimizer's state
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Case:
    """A run of `ranks` GPUs with the configuration of `overrides`; each micro-batch is one document of `tokens`."""

    overrides: list[str]
    ranks: int = 1
    tokens: int = 512
    micro_batches: int = 2
    gpu: FakeGpu = field(default_factory=FakeGpu)


@dataclass(frozen=True)
class Rehearsed:
    """Rehearsed says what rank 0 did.

    `peak` are the bytes on its device at the peak of the second step, `peaks` those of each phase, `estimate` what the
    formula predicts. `kernels` counts operations, `waits` those of the last micro-batch for which the host waits, and
    `largest` is the number of elements of the largest tensor in the second step. `dtypes` and `devices` are of
    parameters, buffers, gradients and optimizer state in the last step.
    """

    peak: int
    peaks: dict[str, int]
    estimate: int | None
    checkpointing: bool
    attention: str
    kernels: dict[str, int]
    waits: dict[str, int]
    largest: int
    dtypes: dict[str, list[str]]
    devices: dict[str, list[str]]


def rehearse(case: Case) -> Rehearsed:
    """Run the steps of a case. Raises what they raise; changes this process for good."""
    memory = DeviceMemory()
    nodes, per_node = max(1, case.ranks // GPUS_PER_NODE), min(case.ranks, GPUS_PER_NODE)
    install(case.gpu, per_node, memory)
    _join_fake_ranks(case.ranks, per_node)
    config = load_config(
        [
            f"trainer.n_gpus_per_node={per_node}", f"trainer.nnodes={nodes}", "trainer.master_addr=node0",
            f"data.max_length={case.tokens}", f"data.train_batch_size={case.ranks * case.micro_batches}",
            "data.micro_batch_size_per_gpu=1", *case.overrides,
        ]
    )  # fmt: skip
    device = preflight.choose_device(config)
    hf_config = load_hf_config(config.model, _resolved(config))
    config = fit(config, hf_config)
    preflight.check(config, device)
    config, estimate = _estimate(config, case.tokens, device)
    return _run(config, family_of(hf_config), device, case, memory, estimate)


def _join_fake_ranks(ranks: int, per_node: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(per_node))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())


def _estimate(config: Config, tokens: int, device: str) -> tuple[Config, Any]:
    from sft_recipe.models.memory_estimate import resolve_activation_checkpointing
    from sft_recipe.models.stats import StatsOf

    return resolve_activation_checkpointing(
        config, StatsOf(_resolved(config), device), Workload(tokens, tokens), device, print
    )


def _resolved(config: Config) -> Any:
    """The folder of the model, which needs no weights."""
    folder = Path(config.model.path)
    return SimpleNamespace(folder=folder, name=str(folder))


def _run(config: Config, family: Family, device: str, case: Case, memory: DeviceMemory, estimate: Any) -> Rehearsed:
    from verl.workers.engine import EngineRegistry

    from sft_recipe.config.auto import uses_gradient_checkpointing
    from sft_recipe.engine import seq2seq_engine
    from sft_recipe.engine.verl_config import build_verl_config

    assert seq2seq_engine
    built = build_verl_config(config, _resolved(config), total_steps=10, device=device)
    batch = _Batch([case.tokens] * case.micro_batches, has_sources=family is SEQ2SEQ)
    _replace_data()
    engine: Any = EngineRegistry.new(
        model_type=family.engine, backend=built.engine.strategy, model_config=built.model,
        engine_config=built.engine, optimizer_config=built.optim, checkpoint_config=built.checkpoint,
    )  # fmt: skip
    engine.on_micro_batch = memory.waits.clear
    with FakeTensorMode(allow_non_fake_inputs=True), memory:
        engine.initialize()
        peaks = {"building": memory.peak, "built": memory.now}
        for _ in range(STEPS):
            tensors: dict[str, list[torch.Tensor]] = {}  # the gradients of the step before must not stay
            memory.peak, memory.largest = memory.now, 0
            with engine.train_mode():
                engine.optimizer_zero_grad()
                engine.forward_backward_batch(batch, None)
                waits = dict(memory.waits)
                peaks["forward and backward"] = memory.peak
                tensors = _gradients(engine)
                engine.optimizer_step()
            peaks["step"] = memory.peak
        tensors |= _tensors(engine)
    return Rehearsed(
        peak=memory.peak,
        peaks=peaks,
        estimate=estimate and estimate.needed(uses_gradient_checkpointing(config, device)),
        checkpointing=built.model.enable_gradient_checkpointing,
        attention=engine.model.config._attn_implementation,
        kernels=dict(memory.calls),
        waits=waits,
        largest=memory.largest,
        dtypes={name: sorted({str(each.dtype) for each in found}) for name, found in tensors.items()},
        devices={name: sorted({each.device.type for each in found}) for name, found in tensors.items()},
    )


def _gradients(engine: Any) -> dict[str, list[torch.Tensor]]:
    return {"gradients": [each.grad for each in engine.module.parameters() if each.grad is not None]}


def _tensors(engine: Any) -> dict[str, list[torch.Tensor]]:
    """Parameters, buffers and optimizer state, by name."""
    parameters = list(engine.module.parameters())
    state = [value for values in engine.optimizer.state.values() for key, value in values.items() if key != "step"]
    return {
        "trained": [each for each in parameters if each.requires_grad],
        "frozen": [each for each in parameters if not each.requires_grad],
        "buffers": [each for each in engine.module.buffers() if each.is_floating_point()],
        "state": [value for value in state if isinstance(value, torch.Tensor | DTensor)],
    }


class _Batch:
    """A batch of documents; its numbers are real where the host reads them.

    All tokens are supervised, or with `has_sources` those of the second half, the target.
    """

    def __init__(self, lengths: list[int], has_sources: bool):
        from tensordict import NonTensorData
        from verl.utils import tensordict_utils

        documents = [torch.arange(length) % 29 for length in lengths]
        masks = [(torch.arange(length) >= (length // 2 if has_sources else 0)).long() for length in lengths]
        nested: dict[str, Any] = {
            name: torch.nested.as_nested_tensor(parts, layout=torch.jagged)
            for name, parts in (("input_ids", documents), ("loss_mask", masks))
        }
        self.real = tensordict_utils.get_tensordict(nested, {})
        tensordict_utils.assign_non_tensor(self.real, micro_batch_docs=NonTensorData([1] * len(lengths)))
        self.mask = torch.cat(masks)

    def __getitem__(self, key: str) -> Any:
        return SimpleNamespace(values=lambda: self.mask)


def _replace_data() -> None:
    """Replace what needs the numbers in tensors, for good: loading, sending and comparing them, and their addresses."""
    import transformers
    from verl.utils import fsdp_utils
    from verl.workers.engine.fsdp import transformer_impl

    from sft_recipe.engine import loss, quantized, seq2seq_engine, sft_engine
    from sft_recipe.engine.attention import packed

    documents_of = sft_engine.planned_documents

    def planned(data: Any) -> list[Any]:
        with _disable_current_modes():
            return list(documents_of(data.real))

    def outside(pack: Any) -> Any:
        def packed_outside(engine: Any, documents: Any) -> Any:
            with _disable_current_modes():
                return pack(engine, documents)

        return packed_outside

    vars(loss)["_address"] = lambda tensor: tensor.untyped_storage()._cdata
    vars(packed)["_matches_causal_mask"] = lambda *_: True
    vars(quantized)["shared_digest"] = lambda _: 0
    vars(sft_engine).update(planned_documents=planned, load_model=_without_weights)
    engine_classes: Any = (sft_engine.SFTEngine, seq2seq_engine.Seq2SeqEngine)
    for engine_class in engine_classes:
        engine_class.pack = outside(engine_class.pack)
    on_device = lambda *_, **__: lambda: torch.device("cuda")  # noqa: E731
    for module in (transformer_impl, fsdp_utils):
        vars(module).update(get_init_weight_context_manager=on_device, fsdp2_load_full_state_dict=lambda *_: None)
    module_classes: Any = (torch.nn.Module, transformers.PreTrainedModel)
    for module_class in module_classes:
        module_class.to = _module_to


def _without_weights(folder: Path, config: Any, dtype: torch.dtype, trusts_code: bool, quantize_on: Any = None) -> Any:
    """Return the model that load_model would, with numbers that do not exist."""
    config.dtype = dtype
    model = build_model(config, trusts_code)
    if quantize_on:
        from sft_recipe.engine.sft_engine import cast_parameters

        cast_parameters(model, dtype)
        pack_linear_layers(model, dtype)
    return model


def _module_to(module: torch.nn.Module, *args: Any, **settings: Any) -> torch.nn.Module:
    """Module.to with new parameters, since a fake tensor keeps its device and dtype; tied ones stay the same."""
    made: dict[torch.Tensor, torch.Tensor] = {}

    def converted(old: torch.Tensor) -> torch.Tensor:
        new = old.detach().to(*args, **settings) if old.is_floating_point() else old
        if (new.dtype, new.device) == (old.dtype, old.device):
            return old
        return torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new

    part: Any
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in tensors.items():
                if old is not None:
                    tensors[name] = made[old] = made[old] if old in made else converted(old)
    return module


def as_json(rehearsed: Rehearsed) -> dict[str, Any]:
    """Return the fields as plain values."""
    return asdict(rehearsed)
