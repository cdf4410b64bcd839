"""The tokenizer is loaded with the chat template that the configuration names."""

import pytest

from sft_recipe.config.schema import ModelConfig
from sft_recipe.errors import ModelError
from sft_recipe.models.families import CAUSAL, SEQ2SEQ
from sft_recipe.models.tokenizer import load_tokenizer
from tests.support import tiny


@pytest.mark.parametrize("family", [CAUSAL, SEQ2SEQ])
@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_an_empty_chat_template_is_an_error_that_names_the_file(content, family, tmp_path):
    tiny.build_tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "mine.jinja"
    path.write_text(content)
    config = ModelConfig(path=str(tmp_path / "model"), chat_template=str(path))
    with pytest.raises(ModelError, match=rf"model\.chat_template: {path} is empty"):
        load_tokenizer(config, tmp_path / "model", family)
