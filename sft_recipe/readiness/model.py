"""Checks of the model: its files, its weights by their headers, its tokenizer and chat template, its license."""

from collections.abc import Iterator
from typing import Any

from sft_recipe.config.schema import Config
from sft_recipe.data.pipeline import make_renderer
from sft_recipe.data.rendering.renderer import Renderer
from sft_recipe.data.token_store import StoreOptions
from sft_recipe.display import byte_size
from sft_recipe.errors import RecipeError
from sft_recipe.models.resolve import ResolvedModel
from sft_recipe.models.stats import ModelStats
from sft_recipe.models.weight_files import count_weights, weight_files
from sft_recipe.readiness.findings import Check, failed, passed, warned


def model_checks(config: Config, model: ResolvedModel, stats: ModelStats) -> Iterator[Check]:
    """Yield the checks of a model that was found."""
    if model.notice:
        yield warned("model", "{notice}", "--model NAME_OR_FOLDER", notice=model.notice)
    files = weight_files(model.folder)
    size = sum(file.stat().st_size for file in files)
    text = "{name}: {files:# weight file}, {size}, {parameters:,} parameters"
    base = stats.total - (stats.trainable if config.lora.enabled else 0)
    yield passed("weights", text, name=model.name, files=len(files), size=byte_size(size), parameters=base)
    stored = sum(map(count_weights, files))
    if stored < base:
        yield failed(
            "weights", "the files hold {stored:,} numbers, but the model has {base:,}: weights are missing",
            "get the complete model", stored=stored, base=base,
        )  # fmt: skip
    licenses = [path.name for path in model.folder.iterdir() if path.name.upper().startswith("LICENSE")]
    found = ", ".join(licenses) or "none in the model's folder; see its page before you publish what you train"
    yield passed("license", "license file: {found}", found=found)


def tokenizer_checks(tokenizer: Any, options: StoreOptions) -> Iterator[Check]:
    """Yield the checks of the chat template, and of the tokens that end a turn."""
    try:
        ids, mask = _encode(make_renderer(tokenizer, options))
    except RecipeError as error:
        yield failed("chat template", "{error}", "model.chat_template=FILE", error=error)
        return
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = [number for number, is_supervised in zip(ids, mask, strict=True) if is_supervised][-1]
    end = tokenizer.convert_ids_to_tokens(last)
    if last in special | {tokenizer.eos_token_id}:
        is_needed = tokenizer.chat_template or not options.has_targets
        text = "supported; assistant turns end with {end}" if is_needed else "not needed; targets end with {end}"
        yield passed("chat template", text, end=end)
    else:
        yield warned(
            "chat template", "assistant turns end with {end}, which is no special token: the model may not stop",
            "model.chat_template=FILE with a template that ends turns", end=repr(end),
        )  # fmt: skip


def _encode(renderer: Renderer) -> tuple[list[int], list[int]]:
    from sft_recipe.data.formats import to_conversation

    record = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]}
    encoded = renderer.encode(to_conversation(record, "check"))
    return list(encoded.input_ids), list(encoded.loss_mask)
