"""Export to Hugging Face: a model folder or a PEFT adapter, with tokenizer, chat template and generation config."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from sft_recipe.checkpoint.state import read_weights
from sft_recipe.config.schema import Config
from sft_recipe.data.run_inputs import RunInputs
from sft_recipe.engine.patches import without_fsdp1
from sft_recipe.errors import ModelError
from sft_recipe.models.hf_config import load_hf_config
from sft_recipe.models.loading import build_model, load_model

PROBE_TOKENS = 16
LOGITS_TOLERANCE = 1e-3  # relative to the largest logit
ADAPTER = "lora_adapter"
MODEL = "huggingface"


class ModelSaver:
    """Writes `folder/huggingface`, which `AutoModelForCausalLM.from_pretrained` loads as it is.

    Full fine-tuning: the model. LoRA: the PEFT adapter; with `lora.merge` the merged model, and the adapter beside it
    in `folder/lora_adapter`. Models are saved in the dtype that training found them in, or in the one that it computed
    in where that is wider: rounding to bf16 would undo most of a few small updates.
    """

    def __init__(self, config: Config, prepared: RunInputs, module: torch.nn.Module, computed_in: torch.dtype):
        self.lora = config.lora
        self.model = prepared.model
        self.tokenizer = prepared.tokenizer
        self.stop_token_ids = prepared.stop_token_ids()
        self.trust_remote_code = config.model.trust_remote_code
        self.hf_config = load_hf_config(config.model, prepared.model)
        self.dtype = max(self.hf_config.dtype or torch.float32, computed_in, key=lambda dtype: dtype.itemsize)
        self.module = module
        with torch.device("meta"):  # not in `save`: building changes torch's default dtype for a while
            self.shell = build_model(self.hf_config, self.trust_remote_code)

    def save(self, state: Path, folder: Path) -> None:
        """Export the stored state `state` into `folder`; on one rank.

        Runs in a thread during training, and so leaves torch's global state unchanged. Raises OSError.
        """
        disable_progress_bar()
        weights, target = read_weights(state), folder / MODEL
        if self.lora.enabled:
            adapter = folder / ADAPTER if self.lora.merge else target
            self._save_adapter(weights, adapter)
            if self.lora.merge:
                self._save_merged(adapter, target)
        else:
            self._save_full(weights, target)
        self.tokenizer.save_pretrained(target)
        self._generation_config().save_pretrained(target)

    def size(self) -> int:
        """Return about how many bytes `save` writes."""
        if self.lora.enabled and not self.lora.merge:
            return 0  # adapters: next to nothing
        return sum(parameter.numel() for parameter in self.shell.parameters()) * self.dtype.itemsize

    def _save_full(self, weights: dict[str, torch.Tensor], target: Path) -> None:
        self.shell.save_pretrained(target, state_dict={name: value.to(self.dtype) for name, value in weights.items()})
        self._set_dtype(target)

    def _save_adapter(self, state: dict[str, torch.Tensor], target: Path) -> None:
        from peft import get_peft_model_state_dict

        peft_model: Any = without_fsdp1(self.module)
        weights = get_peft_model_state_dict(peft_model, state_dict=state, save_embedding_layers=False)
        target.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in weights.items()}, target / "adapter_model.safetensors")
        settings = peft_model.peft_config["default"].to_dict()
        is_hub_id = not Path(self.model.name).exists() and "/" in self.model.name
        settings["base_model_name_or_path"] = self.model.name if is_hub_id else str(self.model.folder.absolute())
        settings["inference_mode"] = True
        text = json.dumps(
            settings,
            indent=2,
            sort_keys=True,
            default=lambda value: sorted(value) if isinstance(value, set) else str(value),
        )
        (target / "adapter_config.json").write_text(text)

    def _save_merged(self, adapter: Path, target: Path) -> None:
        """Computes W + alpha / rank * B A, in fp32, from the weights that training began with.

        The adapters are loaded without initial values, which would draw random numbers. Raises ModelError where the
        merged model, or the saved one, computes other logits than the model with adapters.
        """
        from peft import PeftModel

        base: Any = load_model(self.model.folder, self.hf_config, torch.float32, self.trust_remote_code)
        untie_where_adapted(base, load_file(adapter / "adapter_model.safetensors"))
        adapted: Any = PeftModel.from_pretrained(base, str(adapter), low_cpu_mem_usage=True).eval()
        expected = probe_logits(adapted)
        merged = adapted.merge_and_unload()
        require_same_logits(expected, probe_logits(merged), "merging the adapters")
        merged.to(self.dtype).save_pretrained(target)
        self._set_dtype(target)
        expected = probe_logits(merged.float())
        del base, adapted, merged  # one copy of the model in memory at a time
        config = AutoConfig.from_pretrained(target, trust_remote_code=self.trust_remote_code)
        saved = load_model(target, config, torch.float32, self.trust_remote_code).eval()
        require_same_logits(expected, probe_logits(saved), f"saving the merged model in {target}")

    def _generation_config(self) -> GenerationConfig:
        """The model's generation config, with the tokens that end a turn in the data added to its end tokens."""
        if (self.model.folder / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(self.model.folder)
        else:
            generation = GenerationConfig.from_model_config(self.hf_config)
        known = generation.eos_token_id
        ends = [known] if isinstance(known, int) else list(known or [])
        ends += [token for token in self.stop_token_ids if token not in ends]
        generation.eos_token_id = ends[0] if len(ends) == 1 else ends
        return generation

    def _set_dtype(self, target: Path) -> None:
        path = target / "config.json"
        settings = json.loads(path.read_text())
        settings["dtype"] = str(self.dtype).removeprefix("torch.")
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def untie_where_adapted(model: Any, adapter: Mapping[str, torch.Tensor]) -> None:
    """Give the head separate weights where it shares them with the embeddings and one of the two has adapters.

    Merged into the shared weights, the adapters of one would change the other.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    names = [name for name, module in model.named_modules() if module is head or module is embeddings]
    if any(f".{name}.lora_" in key for name in names for key in adapter):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def probe_logits(model: Any) -> torch.Tensor:
    """Return the model's logits for PROBE_TOKENS tokens of its vocabulary, (tokens, vocabulary)."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(PROBE_TOKENS) * (vocabulary // PROBE_TOKENS)
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0].float()


def require_same_logits(expected: torch.Tensor, found: torch.Tensor, action: str) -> None:
    """Raise ModelError where logits in fp32 differ by more than rounding; `action` is what was done between them."""
    difference = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not difference <= LOGITS_TOLERANCE:
        raise ModelError(
            f"{action} changed the model's logits by {100 * difference:.2g}%, so the result is not the trained model; "
            "the adapter and the resumable state are saved"
        )
