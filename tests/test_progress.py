"""Progress on a terminal has a count where there is a unit, and nothing is shown without a terminal."""

import pytest

from sft_recipe.progress import progress_bar


@pytest.mark.parametrize("is_terminal", [True, False])
def test_count_is_shown_on_a_terminal(monkeypatch, capsys, is_terminal):
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(is_terminal)))
    with progress_bar("writing", "weights", 5) as advance:
        advance(3)
    with progress_bar("loading"):
        pass
    shown = capsys.readouterr().err
    assert ("3 weights" in shown and "loading" in shown and "0 " not in shown.split("loading")[1]) == is_terminal
    assert is_terminal or not shown
