"""Two machines, as network namespaces: what happens when they do not find each other, or lose each other."""

import pytest
from safetensors.torch import load_file

from benchmarks.two_machines import SCENARIOS, Pair, play
from tests.support import tiny
from tests.support.runs import metrics
from tests.support.two_machines import two_machines, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("two_machines") / "model")


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_machines_end_soon_and_say_why(name, model, tmp_path):
    scenario = SCENARIOS[name]
    result = play(scenario, model, tmp_path)
    for code, seconds, output, message in zip(
        result.codes, result.seconds, result.output, scenario.messages, strict=True
    ):
        assert code in scenario.codes, output
        assert seconds < scenario.limit or code == 0, output
        assert message in output, output
        assert "Traceback" not in output, output


EPOCHS = 40  # of five steps: long enough to kill a rank in


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """Return the final model and the losses of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with two_machines() as machines:
        for run in Pair(*machines, model, folder / "run").start(f"trainer.total_epochs={EPOCHS}"):
            assert run.end() == 0, run.output
    return final(folder / "run")


def final(folder):
    """Return the weights and the losses at the end of a run."""
    weights = load_file(folder / f"out/checkpoints/step_{5 * EPOCHS}/huggingface/model.safetensors")
    return weights, [row["train/loss"] for row in metrics(folder / "out")]


def assert_equal(found, expected):
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    assert all(found[0][name].equal(expected[0][name]) for name in expected[0])


def test_killed_rank_is_restarted_on_both_machines(model, tmp_path, undisturbed):
    with two_machines() as machines:
        pair = Pair(*machines, model, tmp_path / "run")
        first, second = pair.start(f"trainer.total_epochs={EPOCHS}", "trainer.auto_restart=2")
        first.wait_for("step 12/")
        second.ranks()[0].kill()
        assert (first.end(), second.end()) == (0, 0), first.output + second.output
    assert "resumed" in first.output
    assert_equal(final(tmp_path / "run"), undisturbed)


def test_machine_that_is_started_again_joins_the_run(model, tmp_path, undisturbed):
    with two_machines() as machines:
        pair = Pair(*machines, model, tmp_path / "run")
        first, second = pair.start(f"trainer.total_epochs={EPOCHS}", "trainer.auto_restart=2")
        first.wait_for("step 12/")
        second.kill()
        again = pair.second.start(pair.arguments(1, f"trainer.total_epochs={EPOCHS}"))
        assert (first.end(), again.end()) == (0, 0), first.output + again.output
    assert_equal(final(tmp_path / "run"), undisturbed)


def test_both_machines_resume(model, tmp_path, undisturbed):
    with two_machines() as machines:
        pair = Pair(*machines, model, tmp_path / "run")
        first, second = pair.start(f"trainer.total_epochs={EPOCHS}")
        first.wait_for("step 12/")
        first.process.terminate()
        assert (first.end(), second.end()) == (75, 75), first.output + second.output
        for run in pair.start(f"trainer.total_epochs={EPOCHS}", "trainer.resume_from=auto"):
            assert run.end() == 0, run.output
    assert_equal(final(tmp_path / "run"), undisturbed)
