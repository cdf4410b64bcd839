"""The format version of a run folder: older checkpoints resume bit for bit, newer ones are refused in words."""

import json
import shutil

import pytest
import yaml

from sft_recipe import FORMAT_VERSION
from sft_recipe.checkpoint.manifest import MANIFEST, fingerprint, read_manifest
from sft_recipe.config.compose import load_config
from sft_recipe.errors import ConfigError
from tests.support import tiny
from tests.support.chaos import differences
from tests.support.runs import metrics, run_here
from tests.support.small_run import arguments, checkpoints


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("format") / "model", attention_dropout=0.1)


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    """A run of ten steps that keeps all checkpoints; copy it before changing it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run_here(*arguments(model, folder, "trainer.max_ckpt_to_keep=null")) == 0
    return folder


def set_format_version(checkpoint, version):
    """Rewrite a manifest with this format version, or without any, and with the checksum that belongs to it."""
    content = json.loads((checkpoint / MANIFEST).read_text())
    del content["checksum"], content["format_version"]
    if version is not None:
        content["format_version"] = version
    (checkpoint / MANIFEST).write_text(json.dumps(content | {"checksum": fingerprint(content)}))


def copy_up_to_step_4(uninterrupted, folder):
    shutil.copytree(uninterrupted, folder)
    for path in (folder / "out/checkpoints").iterdir():
        if path.name != "step_4":
            shutil.rmtree(path)
    return folder / "out/checkpoints/step_4"


def test_run_folder_has_its_format_version_in_every_file(uninterrupted):
    assert read_manifest(uninterrupted / "out/checkpoints/step_4")["format_version"] == FORMAT_VERSION
    assert {row["format_version"] for row in metrics(uninterrupted / "out")} == {FORMAT_VERSION}
    assert yaml.safe_load((uninterrupted / "out/config.yaml").read_text())["format_version"] == FORMAT_VERSION


def test_checkpoint_without_format_version_resumes_bit_for_bit(model, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    set_format_version(copy_up_to_step_4(uninterrupted, folder), None)
    run = arguments(model, folder, "trainer.max_ckpt_to_keep=null", "trainer.resume_from=auto")
    assert run_here(*run) == 0
    assert not differences(uninterrupted / "out", folder / "out")


@pytest.mark.parametrize("spec", ["auto", "out/checkpoints/step_4"])
def test_checkpoint_of_a_newer_version_is_refused_and_kept(model, uninterrupted, tmp_path, capfd, spec):
    folder = tmp_path / "run"
    set_format_version(copy_up_to_step_4(uninterrupted, folder), FORMAT_VERSION + 1)
    resume_from = spec if spec == "auto" else folder / spec
    capfd.readouterr()
    assert run_here(*arguments(model, folder, f"trainer.resume_from={resume_from}")) == 2
    error = capfd.readouterr().err
    assert f"format_version is {FORMAT_VERSION + 1}" in error and "Upgrade sft_recipe" in error
    assert checkpoints(folder) == ["step_4"]


def test_config_of_a_run_folder_is_usable_as_config(uninterrupted, tmp_path):
    config = load_config([], config_dir=uninterrupted / "out")
    assert config.trainer.save_freq == 2
    text = (uninterrupted / "out/config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("format_version: 1", "format_version: 2"))
    with pytest.raises(ConfigError, match="format_version 2.*upgrade sft_recipe"):
        load_config([], config_dir=tmp_path)
