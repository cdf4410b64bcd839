"""--push_to_hub: the login is checked before the export, and only the finished folder is uploaded."""

import json

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from sft_recipe.cli.export import main


@pytest.fixture
def hub(monkeypatch):
    """A hub that records what is asked of it; `fails` makes the upload fail."""
    calls = {}

    def create(self, repository, *, private, exist_ok):
        calls["created"] = (repository, private, exist_ok)
        return f"https://hub.test/{repository}"

    def upload(self, *, repo_id, folder_path, commit_message):
        if calls.get("fails"):
            raise httpx.ConnectError("no route")
        calls["uploaded"] = (repo_id, sorted(path.name for path in folder_path.iterdir()))

    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return calls


def export(model, out, repository="me/model", *args) -> int:
    return main([str(model), "--out", str(out), "--push_to_hub", repository, *args])


def test_finished_folder_is_uploaded(hub, model_dir, tmp_path, capsys):
    assert export(model_dir, tmp_path / "out", "me/model", "--json") == 0
    assert json.loads(capsys.readouterr().out)["hub"] == "https://hub.test/me/model"
    assert hub["created"] == ("me/model", True, True)
    assert hub["uploaded"] == ("me/model", sorted(path.name for path in (tmp_path / "out").iterdir()))


def test_no_login_is_found_before_the_export(hub, model_dir, tmp_path, monkeypatch, capsys):
    def refuse(self):
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(HfApi, "whoami", refuse)
    assert export(model_dir, tmp_path / "out") == 2
    assert "not logged in to the Hugging Face hub; run `hf auth login`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and not hub


def test_failed_upload_keeps_the_export(hub, model_dir, tmp_path, capsys):
    hub["fails"] = True
    assert export(model_dir, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "was not uploaded: no route. Upload it with `hf upload me/model" in error and error.count("error: ") == 1
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize("repository", ["model", "a/b/c", "a/--b", "me/mo del"])
def test_bad_name_is_an_error(hub, repository, model_dir, tmp_path, capsys):
    assert export(model_dir, tmp_path / "out", repository) == 2
    assert f"--push_to_hub {repository}: " in capsys.readouterr().err and not hub
