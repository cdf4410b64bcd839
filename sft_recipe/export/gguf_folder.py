"""Exports into a GGUF file, with a Modelfile for Ollama where its templates can render the chat template."""

from functools import partial
from pathlib import Path

from sft_recipe.checkpoint.manager import check_free_space
from sft_recipe.errors import ModelError
from sft_recipe.export.generation import end_token_ids
from sft_recipe.export.gguf import load_gguf, write_gguf
from sft_recipe.export.gguf_tokenizer import read_tokenizer
from sft_recipe.export.modelfile import modelfile
from sft_recipe.export.options import ExportOptions, Written
from sft_recipe.export.trained import TrainedModel
from sft_recipe.export.verification import prompt_text
from sft_recipe.export.weights import DTYPES, entry_bytes
from sft_recipe.progress import progress_bar

MODELFILE = "Modelfile"


def write_gguf_folder(trained: TrainedModel, options: ExportOptions, folder: Path, show_progress: bool) -> Written:
    """Write the GGUF file and the Modelfile into `folder`. Raises ModelError and OSError."""
    weights, config, tokenizer = trained.weights(), trained.model.config, trained.tokenizer
    end_ids = end_token_ids(trained.generation_settings())
    path = folder / f"model-{options.quant}.gguf"
    check_free_space(folder, sum(entry_bytes(entry, DTYPES["float16"]) for entry in weights.entries.values()))
    with progress_bar("writing", "weights", len(weights.entries), show_progress) as advance:
        write_gguf(weights, config, tokenizer, end_ids, path, options.quant, advance)
    core = read_tokenizer(path)
    usage, remarks = f"```bash\nllama-cli -m {path.name}\n```", []
    try:
        stops = [str(token) for token in tokenizer.convert_ids_to_tokens(end_ids)]
        (folder / MODELFILE).write_text(modelfile(path.name, tokenizer, stops), encoding="utf-8")
        usage = f"```bash\nollama create my-model -f {MODELFILE}\nollama run my-model\n```"
    except ModelError as error:
        remarks.append(str(error))
    return Written(
        kind="merged GGUF file" if trained.source.adapter else "GGUF file",
        dtype=options.quant,
        bound=options.quant,
        load=partial(load_gguf, path, config),
        prompt_ids=lambda prompt: core.encode(prompt_text(tokenizer, prompt), add_special_tokens=False).ids,
        usage=usage,
        remarks=remarks,
    )
