"""Export to Hugging Face: a model folder or a PEFT adapter, with tokenizer, chat template and generation config."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.logging import disable_progress_bar

from sft_recipe.checkpoint.state import read_weights
from sft_recipe.config.schema import Config
from sft_recipe.data.run_inputs import RunInputs
from sft_recipe.engine.patches import without_fsdp1
from sft_recipe.errors import ModelError, first_line
from sft_recipe.export.generation import generation_settings
from sft_recipe.export.layout import ADAPTER, MODEL
from sft_recipe.export.merge import merge_adapters, probe_logits, require_same_logits
from sft_recipe.models.hf_config import load_hf_config, read_hf_config
from sft_recipe.models.loading import build_model, load_model
from sft_recipe.models.quantization import adapter_metadata, round_weights
from sft_recipe.models.resolve import ResolvedModel

ADAPTER_NAME = re.compile(r"(\.lora_\w+)\.default(?=\.|$)")  # which a file of peft leaves out


class ModelSaver:
    """Writes `folder/huggingface`, which the auto class of its family loads as it is.

    Full fine-tuning: the model. LoRA: the PEFT adapter; with `lora.merge` the merged model, and the adapter beside it
    in `folder/lora_adapter`. It is merged into the weights that training saw, with QLoRA those in 4 bits. Models are
    saved in the dtype that training found them in, or in the one that it computed in where that is wider: rounding to
    bf16 would undo most of a few small updates.
    """

    def __init__(self, config: Config, prepared: RunInputs, module: torch.nn.Module, computed_in: torch.dtype):
        self.lora = config.lora
        self.model = prepared.model
        self.tokenizer = prepared.tokenizer
        self.stop_token_ids = prepared.stop_token_ids()
        self.trusts_code = config.model.trust_remote_code
        self.hf_config = load_hf_config(config.model, prepared.model)
        stored: Any = self.hf_config.dtype
        self.dtype: torch.dtype = max(stored or torch.float32, computed_in, key=lambda dtype: dtype.itemsize)
        self.module = module
        self.quantized_in = computed_in if config.lora.quantize else None
        with torch.device("meta"):  # not in `save`: building changes torch's default dtype for a while
            self.shell = build_model(self.hf_config, self.trusts_code)
        self.generation_config = generation_settings(self.model.folder, self.hf_config, self.stop_token_ids)

    def check(self) -> None:
        """Export everything but the weights into a temporary folder, as a trial; on one rank.

        Raises ModelError where that fails: at the first save it would be too late.
        """
        with tempfile.TemporaryDirectory(prefix="sft_recipe-") as folder:
            try:
                if self.lora.enabled:
                    self._save_adapter({}, Path(folder) / ADAPTER)
                if not self.lora.enabled or self.lora.merge:
                    self._save_model(self.shell, Path(folder) / MODEL, {})
                self._save_settings(Path(folder) / MODEL)
            except Exception as error:  # of transformers or of the model's own code
                raise ModelError(
                    f"{self.model.name} cannot be exported, so training would end without a model: "
                    f"{first_line(error).rstrip('.')}. Correct the model's folder, or model.override_config."
                ) from error

    def save(self, state: Path, folder: Path) -> None:
        """Export the stored state `state` into `folder`; on one rank.

        Runs in a thread during training, and so leaves torch's global state unchanged. Raises OSError.
        """
        target = folder / MODEL
        if self.lora.enabled:
            adapter = folder / ADAPTER if self.lora.merge else target
            self._save_adapter(dict(read_weights(state)), adapter)
            if self.lora.merge:
                self._save_merged(adapter, target)
        else:
            weights = {name: value.to(self.dtype, copy=True) for name, value in read_weights(state)}
            self._save_model(self.shell, target, weights)
        self._save_settings(target)

    def size(self) -> int:
        """Return about how many bytes `save` writes."""
        if self.lora.enabled and not self.lora.merge:
            return 0  # adapters: next to nothing
        return sum(parameter.numel() for parameter in self.shell.parameters()) * self.dtype.itemsize

    def _save_model(self, model: Any, target: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        disable_progress_bar()
        model.generation_config = GenerationConfig()  # the model's own may be one that transformers refuses to save
        model.save_pretrained(target, state_dict=weights)
        path = target / "config.json"
        settings = json.loads(path.read_text())
        settings["dtype"] = str(self.dtype).removeprefix("torch.")
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

    def _save_settings(self, target: Path) -> None:
        self.tokenizer.save_pretrained(target)
        text = json.dumps(self.generation_config, indent=2, sort_keys=True) + "\n"
        (target / GENERATION_CONFIG_NAME).write_text(text)

    def _save_adapter(self, state: dict[str, torch.Tensor], target: Path) -> None:
        # Not peft's get_peft_model_state_dict: it finds no adapters inside the wrappers of FSDP1.
        peft_model: Any = without_fsdp1(self.module)
        target.mkdir(parents=True, exist_ok=True)
        tensors = {ADAPTER_NAME.sub(r"\1", name): value.contiguous() for name, value in state.items()}
        save_file(tensors, target / "adapter_model.safetensors", metadata=adapter_metadata(self.quantized_in))
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
        """Raises ModelError where the merged model, or the saved one, computes other logits than with adapters."""
        base = load_model(self.model.folder, self.hf_config, torch.float32, self.trusts_code)
        if self.quantized_in:
            round_weights(base, self.quantized_in)
        merged = merge_adapters(base, adapter)
        for weight in merged.parameters():  # not the buffers, such as the frequencies of rotary embeddings
            weight.data = weight.data.to(self.dtype)
        self._save_model(merged, target)
        expected = probe_logits(merged.float())
        del base, merged  # one copy of the model in memory at a time
        config = read_hf_config(ResolvedModel(target, str(target)), self.trusts_code)
        saved = load_model(target, config, torch.float32, self.trusts_code).eval()
        require_same_logits(expected, probe_logits(saved), f"saving the merged model in {target}")
