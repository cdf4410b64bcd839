"""Liger's kernels (https://arxiv.org/abs/2410.10989) for norms, gated MLPs and rotary embeddings, on GPUs."""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version

from transformers import PretrainedConfig, PreTrainedModel

from sft_recipe.errors import ModelError, PreflightError, first_line


def require_liger_support(config: PretrainedConfig) -> None:
    """Raise ModelError where liger-kernel has no kernels for such models, PreflightError where it does not run."""
    known = _functions()
    if config.model_type not in known:
        raise ModelError(
            f"model.use_liger=true: liger-kernel {version('liger-kernel')} has no kernels for {config.model_type} "
            f"models, only for {', '.join(sorted(known))}; set it to false"
        )


def apply_liger(model: PreTrainedModel) -> None:
    """Replace functions of the model's modules, and of its module in transformers.

    Head and loss stay: engine/loss.py computes them. Raises ModelError where the model is not of the kind that
    liger-kernel expects.
    """
    try:
        _functions()[model.config.model_type](model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    except Exception as error:  # it reads attributes that another version of the model may lack
        raise ModelError(
            f"model.use_liger=true: liger-kernel {version('liger-kernel')} cannot change this "
            f"{type(model).__name__}: {first_line(error)}; set it to false"
        ) from error


def _functions() -> dict[str, Callable]:
    """The functions that change a model, by its type; imports Triton."""
    try:
        return import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise PreflightError(f"model.use_liger=true: liger-kernel cannot be imported: {first_line(error)}") from error
