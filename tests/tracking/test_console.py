"""What the console prints is the text itself: brackets in a value or a path are no markup."""

from sft_recipe.tracking.console import notice


def test_brackets_in_a_notice_are_text(capsys):
    notice("model.freeze=[encoder] of data[/b].jsonl")
    assert "model.freeze=[encoder] of data[/b].jsonl" in capsys.readouterr().out
