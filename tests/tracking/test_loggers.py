"""Loggers write into the run folder, a resumed run continues its W&B run, and a logger that fails costs no run."""

import os
import sys
from types import ModuleType

import pytest

from sft_recipe.engine.cpu.platform import use_cpu
from sft_recipe.errors import PreflightError
from sft_recipe.tracking import wandb_run
from tests.support import tiny
from tests.support.runs import ROOT, metrics, run_here
from tests.support.small_run import arguments

VARIABLES = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR", "WANDB_MODE", "WANDB_ENTITY")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("loggers") / "model")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """A home and a current folder without settings of wandb."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def wandb(monkeypatch):
    """A wandb that remembers the environment of each start."""
    use_cpu()
    stub = ModuleType("wandb")
    stub.starts, stub.steps, stub.ends = [], [], []
    stub.init = lambda **_: stub.starts.append({name: os.environ.get(name) for name in VARIABLES})
    stub.log = lambda data, step: stub.steps.append(step)
    stub.finish = lambda exit_code: stub.ends.append(exit_code)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    return stub


def logged(model, folder, *extra, steps=2):
    logs = ["trainer.logger=[wandb]", f"trainer.total_training_steps={steps}", "data.val_files=null"]
    return arguments(model, folder, *logs, *extra)


def run(model, folder, *extra, steps=2):
    return run_here(*logged(model, folder, *extra, steps=steps))


def test_resumed_and_restarted_runs_continue_their_wandb_run(model, tmp_path, wandb, monkeypatch):
    assert run(model, tmp_path / "a") == 0
    assert run(model, tmp_path / "a", "trainer.resume_from=auto", steps=4) == 0
    assert run(model, tmp_path / "b") == 0
    first, resumed, other = wandb.starts
    assert first == resumed and first["WANDB_RUN_ID"] and first["WANDB_RESUME"] == "allow"
    assert first["WANDB_DIR"] == str(tmp_path / "a/out") and other["WANDB_DIR"] == str(tmp_path / "b/out")
    assert other["WANDB_RUN_ID"] != first["WANDB_RUN_ID"]
    assert wandb.steps == [1, 2, 3, 4, 1, 2] and wandb.ends == [0, 0, 0]


@pytest.mark.parametrize("restarts", ["0", "1"])
def test_only_a_restart_continues_a_run_without_a_checkpoint(model, tmp_path, wandb, monkeypatch, restarts):
    (tmp_path / "a/out").mkdir(parents=True)
    (tmp_path / "a/out/wandb_run_id").write_text("before")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    assert run(model, tmp_path / "a", "trainer.resume_from=auto") == 0
    assert (wandb.starts[0]["WANDB_RUN_ID"] == "before") == (restarts == "1")


def test_what_the_user_has_set_stays(model, tmp_path, wandb, monkeypatch, home):
    (home / "wandb").mkdir()
    (home / "wandb/settings").write_text("[default]\nentity = a team\nmode = offline\n")
    mine = {"WANDB_RUN_ID": "mine", "WANDB_RESUME": "must", "WANDB_MODE": "online"}
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    assert run(model, tmp_path / "a") == 0
    assert wandb.starts == [mine | {"WANDB_DIR": str(tmp_path / "a/out"), "WANDB_ENTITY": "a team"}]


def test_offline_wandb_writes_into_the_run_folder(warm, model, tmp_path):
    """With wandb itself, which reads its environment once in a process."""
    end = warm.run(logged(model, tmp_path / "a"), WANDB_MODE="offline")
    assert end.code == 0, end.output
    (files,) = (tmp_path / "a/out/wandb").glob("offline-run-*/run-*.wandb")
    assert files.stem == f"run-{(tmp_path / 'a/out/wandb_run_id').read_text()}"
    assert not (ROOT / "wandb").exists()


def test_file_logger_writes_into_the_run_folder(model, tmp_path, home):
    use_cpu()
    assert run_here(*arguments(model, tmp_path, "trainer.logger=[file]", "trainer.total_training_steps=1")) == 0
    assert list((tmp_path / "out/sft_recipe").iterdir()) and list(home.iterdir()) == []


def test_missing_login_is_reported_before_the_run(model, tmp_path, wandb, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_API_KEY")
    assert run(model, tmp_path / "a") == 2
    error = capfd.readouterr().err
    assert "wandb login" in error and "WANDB_MODE=offline" in error and error.count("\n") == 1
    assert not (tmp_path / "a/out").exists()


LOGINS = {
    "a key": ({"WANDB_API_KEY": "0" * 40}, {}),
    "a token": ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, {}),
    "offline": ({"WANDB_MODE": "offline"}, {}),
    "disabled": ({"WANDB_MODE": "disabled"}, {}),
    "disabled by its older name": ({"WANDB_DISABLED": "true"}, {}),
    "netrc": ({}, {".netrc": "machine api.wandb.ai\n  login user\n  password key\n"}),
    "netrc of a server": (
        {"WANDB_BASE_URL": "https://example.org:81", "NETRC": "mine"},
        {"mine": "machine example.org:81 login user password key"},
    ),
    "offline in this folder": ({}, {"wandb/settings": "[default]\nmode = offline\n"}),
    "offline for the user": ({}, {".config/wandb/settings": "[default]\nmode = offline\n"}),
}
NO_LOGINS = {
    "nothing": ({}, {}),
    "netrc of another server": ({}, {".netrc": "machine github.com login user password key"}),
    "broken files": ({}, {".netrc": "machine", "wandb/settings": "mode = offline", ".config/wandb/settings": "[x]\n"}),
    "online in this folder": (
        {},
        {"wandb/settings": "[default]\nmode = online\n", ".config/wandb/settings": "[default]\nmode = offline\n"},
    ),
}


@pytest.mark.parametrize("case", [*LOGINS, *NO_LOGINS])
def test_login_is_looked_for_where_wandb_does(monkeypatch, home, case):
    environment, files = (LOGINS | NO_LOGINS)[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    if case in LOGINS:
        wandb_run.check_login()
    else:
        with pytest.raises(PreflightError, match="no API key"):
            wandb_run.check_login()


def test_logger_that_does_not_start_is_one_message(model, tmp_path, wandb, monkeypatch, capfd):
    def fail(**_):
        raise OverflowError("odd\nand more")

    wandb.init = fail
    assert run(model, tmp_path / "a") == 2
    error = capfd.readouterr().err
    assert "trainer.logger: wandb cannot be started: odd." in error and "Traceback" not in error


def test_logger_that_fails_does_not_end_the_run(model, tmp_path, wandb, monkeypatch, capfd):
    def fail(data, step):
        wandb.steps.append(step)
        if step == 2:
            raise BrokenPipeError("the process is gone")

    wandb.log = fail
    assert run(model, tmp_path / "a", steps=4) == 0
    assert capfd.readouterr().out.count("WARNING: trainer.logger failed") == 1
    assert wandb.steps == [1, 2] and [row["step"] for row in metrics(tmp_path / "a/out")] == [1, 2, 3, 4]
