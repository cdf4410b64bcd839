"""A model's tokenizer, with the chat template that is trained and saved."""

import json
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft_recipe.config.schema import ModelConfig
from sft_recipe.errors import ModelError, first_line
from sft_recipe.files import user_path
from sft_recipe.models.families import CAUSAL, Family
from sft_recipe.models.resolve import ResolvedModel


def load_tokenizer(
    config: ModelConfig, folder: Path, family: Family, say: Callable[[str], None] = lambda text: None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer with the chat template for training: `model.chat_template`, else the model's, else ChatML.

    An encoder-decoder model needs no template, and gets none that it does not have. The template is saved with the
    trained model. Raises ModelError where the folder has no tokenizer that transformers can read, or the template
    cannot be read or is empty.
    """
    tokenizer = read_tokenizer(folder, config.tokenizer_path or config.path, config.trust_remote_code)
    if config.chat_template:
        path = user_path(config.chat_template)
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ModelError(f"model.chat_template: {path.absolute()} cannot be read: {reason}") from None
        if not tokenizer.chat_template.strip():
            raise ModelError(f"model.chat_template: {path.absolute()} is empty; expected a chat template in Jinja")
    if family is CAUSAL and ensure_chat_template(tokenizer):
        say(f"{config.path} has no chat template: a plain ChatML one is used, and saved with the trained model.")
    return tokenizer


def read_tokenizer(folder: Path, name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder, which the user calls `name`, as it is.

    Raises ModelError where it cannot be read, and where there is none: then transformers makes one without vocabulary.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of the tokenizer's files, or of the config.json that names its class
        raise ModelError(f"{folder} holds no usable tokenizer: {first_line(error)}") from None
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if len(set(tokenizer.get_vocab()) - added) <= 1:  # T5's has a word boundary
        raise ModelError(
            f"{name} has no tokenizer beside it: copy tokenizer.json and tokenizer_config.json there; training "
            "can also name their folder with --tokenizer_path"
        )
    return tokenizer


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a base model's tokenizer a plain ChatML template; returns False if it already has a template.

    A turn must end with a token of the vocabulary. Where `<|im_end|>` is none, the markers are plain text to the model
    and assistant turns end with the eos token instead. A tokenizer that begins texts with bos gets it in the template,
    since rendered text is tokenized without special tokens. Raises ModelError if there is no eos token either.
    """
    if tokenizer.chat_template:
        return False
    end = "'<|im_end|>'"
    if "<|im_end|>" not in special_tokens(tokenizer):
        if not tokenizer.eos_token:
            raise ModelError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template and no eos token, so that no "
                "turn could end; set eos_token in its tokenizer_config.json, or give it a chat template."
            )
        end = f"(eos_token if message['role'] == 'assistant' else {end})"
    begin = "{{ bos_token }}" if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else ""
    tokenizer.chat_template = (
        f"{begin}{{% for message in messages %}}"
        f"{{{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + {end} + '\\n' }}}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return True


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the tokens that are flagged special, and eos."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return special | {tokenizer.eos_token} if tokenizer.eos_token else special


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: ResolvedModel) -> None:
    """Raise ModelError where the tokenizer has ids that the model has no embedding for."""
    settings = json.loads((model.folder / "config.json").read_text())
    parts = (settings, settings.get("text_config"), settings.get("decoder"))  # the last of an encoder-decoder
    embeddings = next((part["vocab_size"] for part in parts if isinstance(part, dict) and part.get("vocab_size")), None)
    largest = max(tokenizer.get_vocab().values())
    if embeddings and largest >= embeddings:
        raise ModelError(
            f"tokenizer and model do not match: the tokenizer has a token with id {largest}, but {model.name} has "
            f"{embeddings} embeddings; use the tokenizer that belongs to the model (TOKENIZER_PATH)"
        )
