"""A run folder's configuration that cannot be read is one message."""

import pytest

from sft_recipe.config.run_config import read_run_config
from sft_recipe.errors import CheckpointError


@pytest.mark.parametrize(
    "text", ["optim: {lr: !!bool x}", 'x: !!float ""', "x: !!timestamp abc", "[", "[" * 5000, "text", "\x00"]
)
def test_unreadable_configuration_is_one_message(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.yaml (cannot be read: .|is not the configuration of a run)"):
        read_run_config(tmp_path)
