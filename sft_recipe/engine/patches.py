"""Every monkey patch of a library and every private API in use, each checked before it is used.

A private API is a name that begins with an underscore: its library may rename it in any release. `check` runs when an
engine is built and looks for all that its device needs, so that a library that has moved is reported once, in one
message, before training starts. No other module of sft_recipe uses a private API of these libraries, except those that
come before `engine` in the import order, each in one place:

    models/stats.py      transformers: `PreTrainedModel._no_split_modules`; a model without it is refused there, and
                         one with `_is_stateful`
    data/sources.py      datasets: `Dataset._fingerprint`
    config/compose.py    Hydra: `hydra.core.override_parser` and `hydra.core.global_hydra`, which are not documented

The only monkey patches of a run are `keep_unwrapped`, of verl, and with model.use_liger those of liger-kernel, of
transformers (models/liger.py). A rehearsal (rehearsal/) replaces much of torch.cuda with
the help of private names, in a process that does nothing else.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from sft_recipe.errors import PreflightError, pip_install

# Versions with which all of these were tried; pyproject.toml asks for the same.
SUPPORTED = {"peft": ">=0.18,<0.22", "torch": ">=2.11,<2.13.1", "transformers": ">=5.10,<5.11", "verl": "==0.9.1"}


@dataclass(frozen=True)
class PrivateApi:
    """A private name of a library: `path` is "module:attribute.attribute"; an attribute with () is called.

    `parameters` are the names of those that it takes, in order; empty where presence is enough. `used_by` names a
    function of the library, by its path, that must look the name up: else replacing it would have no effect.
    """

    package: str
    path: str
    parameters: tuple[str, ...] = ()
    used_by: str | None = None

    def find(self) -> Any:
        """Return the object. Raises PreflightError where it is missing or takes other parameters."""
        problem = self.problem()
        if problem:
            raise PreflightError(_moved([problem], [self.package]))
        return _resolve(self.path)

    def problem(self) -> str | None:
        """Return what is wrong with the installed library, or None."""
        name = self.path.replace(":", ".")
        try:
            found = _resolve(self.path)
        except (ImportError, AttributeError):
            return f"{name} is missing"
        if self.parameters:
            try:
                taken = _parameters(found)
            except (TypeError, ValueError):
                return f"{name} is not a function with readable parameters"
            if taken != self.parameters:
                return f"{name} takes ({', '.join(taken)}) instead of ({', '.join(self.parameters)})"
        if self.used_by:
            try:
                names = _resolve(self.used_by).__code__.co_names
            except (ImportError, AttributeError):
                return f"{self.used_by.replace(':', '.')} is missing"
            if self.path.rpartition(":")[2].rpartition(".")[2] not in names:
                return f"{self.used_by.replace(':', '.')} no longer calls {name}"
        return None


_ENGINE = "verl.workers.engine.fsdp.transformer_impl:FSDPEngine"
_BUILD = f"{_ENGINE}._build_model_optimizer"
_SELECT = PrivateApi(
    "verl",
    "verl.utils.fsdp_utils:_select_fsdp2_wrap_targets",
    ("model", "fsdp_transformer_layer_cls_to_wrap"),
    "verl.utils.fsdp_utils:apply_fsdp2",
)
_POLICY = PrivateApi(
    "verl",
    "verl.workers.engine.fsdp.transformer_impl:get_fsdp_wrap_policy",
    ("module", "config", "is_lora"),
    f"{_ENGINE}._build_fsdp_module",
)
_ASSERT_ASYNC = PrivateApi("torch", "torch.ops:aten._assert_async.msg", ("self", "assert_msg"))
_SOFTMAX_BACKWARD = PrivateApi(
    "torch", "torch.ops:aten._softmax_backward_data.default", ("grad_output", "output", "dim", "input_dtype")
)
_DTENSOR_SPEC = PrivateApi("torch", "torch.distributed.tensor:DTensor._spec")
_TREE_MAP = PrivateApi("torch", "torch.utils._pytree:tree_map_only")
_HANDLE = "torch.distributed.fsdp._flat_param:FlatParamHandle"
_SHARDED_VIEWS = PrivateApi("torch", f"{_HANDLE}._use_sharded_views", ("self",), f"{_HANDLE}._use_sharded_flat_param")
_WITHOUT_WEIGHTS = [
    PrivateApi("peft", f"{module}:init_empty_weights") for module in ("peft.tuners.tuners_utils", "peft.peft_model")
]

EVERYWHERE = (
    _SELECT,
    _POLICY,
    # Methods that SFTEngine overrides.
    PrivateApi("verl", f"{_ENGINE}._build_module", ("self",), _BUILD),
    PrivateApi("verl", f"{_ENGINE}._build_fsdp_module", ("self", "module"), _BUILD),
    PrivateApi("verl", f"{_ENGINE}._build_lora_module", ("self", "module"), _BUILD),
    PrivateApi("verl", f"{_ENGINE}._build_lr_scheduler", ("self", "optimizer"), _BUILD),
    PrivateApi("verl", f"{_ENGINE}._gradient_sync_context", ("self", "is_last_micro_batch")),
    PrivateApi("transformers", "transformers:PretrainedConfig._attn_implementation"),
    PrivateApi("transformers", "transformers:PreTrainedModel._no_split_modules"),
    PrivateApi("transformers", "transformers:PreTrainedModel._supports_sdpa"),
    PrivateApi("transformers", "transformers:PreTrainedModel._supports_flash_attn"),
    PrivateApi("transformers", "transformers:PreTrainedModel._compatible_flash_implementations"),
    PrivateApi("transformers", "transformers:PreTrainedModel._can_record_outputs"),
    _ASSERT_ASYNC,
    _DTENSOR_SPEC,
    _SHARDED_VIEWS,
    *_WITHOUT_WEIGHTS,
)
ON_CPUS = (
    _SOFTMAX_BACKWARD,
    _TREE_MAP,
    PrivateApi("torch", "torch:Tensor._version"),
    PrivateApi("torch", "torch.nn:Module()._parameters"),
)


def check(device: str) -> None:
    """Raises PreflightError with all that the installed libraries lack for training on `device`, "cuda" or "cpu"."""
    apis = EVERYWHERE + (ON_CPUS if device == "cpu" else ())
    problems = {api: problem for api in apis if (problem := api.problem())}
    if problems:
        raise PreflightError(_moved(list(problems.values()), [api.package for api in problems]))


def _moved(problems: list[str], packages: list[str]) -> str:
    names = sorted(set(packages))
    installed = ", ".join(f"{name} {version(name)}" for name in names)
    wanted = " ".join(f"'{name}{SUPPORTED[name]}'" for name in names)
    return (
        f"The installed {installed} does not fit this version of sft_recipe: {'; '.join(problems)}. "
        f"Install a supported version: {pip_install(wanted)}"
    )


def _resolve(path: str) -> Any:
    module, _, attributes = path.partition(":")
    found: Any = torch.ops if module == "torch.ops" else import_module(module)
    for name in attributes.split("."):
        found = getattr(found, name.removesuffix("()"))
        found = found() if name.endswith("()") else found
    return found


def _parameters(function: Any) -> tuple[str, ...]:
    schema = getattr(function, "_schema", None)  # of torch's operators, which inspect cannot read
    if schema is not None:
        return tuple(argument.name for argument in schema.arguments)
    return tuple(inspect.signature(function).parameters)


# transformers


def attention_implementation(config: PretrainedConfig) -> str:
    """Return the name of the attention that a model with this configuration uses; "eager" where none is chosen."""
    return config._attn_implementation or "eager"


def set_attention_implementation(config: PretrainedConfig, name: str) -> None:
    """Choose the attention of models that are built with this configuration."""
    config._attn_implementation = name


def supports_sdpa(model_class: type[PreTrainedModel]) -> bool:
    """Return whether the model can attend with PyTorch's scaled_dot_product_attention."""
    return model_class._supports_sdpa


def supports_flash_attention(model_class: type[PreTrainedModel], name: str) -> bool:
    """Return whether the model can attend with the FlashAttention that transformers calls `name`."""
    compatible = getattr(model_class, "_compatible_flash_implementations", None)  # None: all of them
    return model_class._supports_flash_attn and (compatible is None or name in compatible)


def layer_class_names(model: PreTrainedModel) -> Collection[str]:
    """Return the names of the classes of the model's layers."""
    return model._no_split_modules or ()


def recorded_outputs(module: nn.Module) -> Collection[str]:
    """Return the names of the intermediate outputs that a model's module returns on request: `router_logits`, ..."""
    return getattr(module, "_can_record_outputs", None) or ()


# verl


@contextmanager
def keep_unwrapped(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, verl does not wrap any module that holds one of `weights` in an FSDP unit.

    They belong to the root's unit then, and are unsharded while its forward and backward run. verl would wrap an untied
    head with FSDP2, and its adapters with FSDP1; those are unsharded only while they are called themselves. With FSDP2
    it would also wrap embeddings inside of a layer that is wrapped already, which fails: T5 has such.
    """
    excluded = set(weights)
    select, policy_for = _SELECT.find(), _POLICY.find()

    def select_others(*args: Any) -> list[nn.Module]:
        chosen = [module for module in select(*args) if excluded.isdisjoint(module.parameters())]
        inner = {part for module in chosen for part in module.modules() if part is not module}
        return [module for module in chosen if module not in inner]

    def policy_for_others(**settings: Any) -> Callable | None:
        policy = policy_for(**settings)
        if policy is None:
            return None

        def wraps(module: nn.Module, recurse: bool, **more: Any) -> bool:
            is_excluded = not recurse and not excluded.isdisjoint(module.parameters())
            return not is_excluded and policy(module=module, recurse=recurse, **more)

        return wraps

    _replace(_SELECT, select_others)
    _replace(_POLICY, policy_for_others)
    try:
        yield
    finally:
        _replace(_SELECT, select)
        _replace(_POLICY, policy_for)


def _replace(api: PrivateApi, value: Any) -> None:
    module, _, name = api.path.partition(":")
    setattr(import_module(module), name, value)


# peft


def build_adapters_in_one_thread() -> None:
    """Let peft build layers without weights in the context of torch.device("meta"), which is that of one thread.

    Its own context replaces nn.Module.register_parameter in all threads: FSDP1, in the one that trains, would fail.
    """
    for api in _WITHOUT_WEIGHTS:
        api.find()
        _replace(api, partial(torch.device, "meta"))


# torch


def assert_async(condition: torch.Tensor, message: str) -> None:
    """Fail with `message` where the only element of `condition` is false; does not wait for a GPU."""
    _ASSERT_ASYNC.find()(condition, message)


def without_fsdp1(module: nn.Module) -> nn.Module:
    """Return the module that FSDP1 has wrapped, or `module` itself."""
    return module.module if isinstance(module, FullyShardedDataParallel) else module


def restore_frozen_root(module: nn.Module) -> None:
    """Let the modules of FSDP1's root unit hold their frozen parameters again, after a backward pass.

    On one GPU, where the unit is not sharded, FSDP1 takes weights that it did not cast for restored and leaves views of
    them in their places. The next forward pass would fail for tied weights, and a state dictionary for any.
    """
    handle = module._handle if isinstance(module, FullyShardedDataParallel) else None
    if handle and not handle.uses_sharded_strategy and not handle.flat_param.requires_grad:
        handle._use_sharded_views()


def dtensor_like(local: torch.Tensor, original: DTensor) -> DTensor:
    """Return a DTensor with the layout of `original` whose part on this rank is `local`, on any device.

    DTensor.from_local would move `local` to the device of the mesh.
    """
    return DTensor(local, original._spec, requires_grad=False)


def softmax_backward() -> Callable:
    """Return a function (gradient of the softmax, softmax, dimension, dtype) -> gradient of its input."""
    return _SOFTMAX_BACKWARD.find()


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """Apply `function` to all tensors in nested tuples, lists and dictionaries."""
    return _TREE_MAP.find()(torch.Tensor, function, tree)


def replace_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set a parameter of a module without `register_parameter`, which libraries replace in all threads at times."""
    module._parameters[name] = parameter


def changes_in_place(tensor: torch.Tensor) -> int:
    """Return how often a tensor has been changed in place."""
    return tensor._version
