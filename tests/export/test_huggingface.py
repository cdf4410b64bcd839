"""What cannot be exported is found before the first step, or costs the export only: never the state to resume from."""

import errno
import json
import signal

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from sft_recipe.checkpoint.manifest import read_manifest, verify
from sft_recipe.engine.cpu.platform import use_cpu
from tests.support import tiny
from tests.support.chaos import differences, send_signal_at
from tests.support.runs import metrics, run_here
from tests.support.small_run import STEPS, arguments, checkpoints

use_cpu()  # before the next import, which lets verl choose a platform
from sft_recipe.export import huggingface  # noqa: E402
from sft_recipe.export.huggingface import ModelSaver  # noqa: E402

SHORT = "trainer.total_training_steps=2"
MERGED = ["lora.enabled=true", "lora.merge=true"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("export") / "model")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run_here(*arguments(model, folder)) == 0
    return folder


def model_with(folder, generation_config):
    tiny.build_model(folder)
    (folder / "generation_config.json").write_text(generation_config)
    return folder


@pytest.mark.parametrize("shape", [[], MERGED])
@pytest.mark.parametrize(
    "content",
    [
        {"do_sample": False, "temperature": 0.9},
        {"temperature": 0.6, "top_p": 0.9},
        {"num_beams": 1, "early_stopping": True},
        {"pad_token_id": -1},
        {"output_scores": True, "eos_token_id": [0]},
    ],
)
def test_generation_config_that_transformers_does_not_save_is_copied(tmp_path, content, shape):
    base = model_with(tmp_path / "base", json.dumps(content))
    assert run_here(*arguments(base, tmp_path, SHORT, *shape)) == 0
    saved = tmp_path / "out/checkpoints/step_2/huggingface"
    end = tiny.build_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert json.loads((saved / "generation_config.json").read_text()) == content | {
        "eos_token_id": [0, end] if "eos_token_id" in content else end
    }
    GenerationConfig.from_pretrained(saved)


def test_generation_config_that_is_not_json_is_replaced(tmp_path, capfd):
    base = model_with(tmp_path / "base", "{")
    assert run_here(*arguments(base, tmp_path, SHORT)) == 0
    said = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert said.count("generation_config.json is not JSON") == 1
    saved = GenerationConfig.from_pretrained(tmp_path / "out/checkpoints/step_2/huggingface")
    assert saved.eos_token_id == tiny.build_tokenizer().eos_token_id


@pytest.mark.parametrize("content", ['{"max_new_tokens": -1}', "[]", '{"pad_token_id": "x"}', "[" * 100_000])
def test_generation_config_that_transformers_does_not_load_is_one_message(tmp_path, capfd, content):
    base = model_with(tmp_path / "base", content)
    assert run_here(*arguments(base, tmp_path, SHORT)) == 2
    error = capfd.readouterr().err
    assert "base/generation_config.json cannot be used" in error and "Traceback" not in error
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("shape", [[], MERGED, ["lora.enabled=true"]])
def test_export_is_tried_before_the_first_step(model, tmp_path, capfd, monkeypatch, shape):
    def refuse(*_):
        raise ValueError("odd\nand more")

    monkeypatch.setattr(type(tiny.build_tokenizer()), "save_pretrained", refuse)
    assert run_here(*arguments(model, tmp_path, *shape)) == 2
    error = capfd.readouterr().err
    assert "cannot be exported" in error and "odd. Correct" in error, error
    assert checkpoints(tmp_path) == [] and not (tmp_path / "out/metrics.jsonl").exists()


def fail_exports(count, error):
    """Let the first `count` exports fail when they have written the model."""
    real, calls = ModelSaver._save_settings, []

    def fail(self, target):
        calls.append(target)
        if 1 < len(calls) <= 1 + count:  # the first is the trial
            raise error
        real(self, target)

    return fail


@pytest.mark.parametrize("waits", ["true", "false"])
@pytest.mark.parametrize("error", [ValueError("odd"), OSError(errno.ENOSPC, "No space left on device")])
def test_failed_export_costs_neither_the_state_nor_the_run(monkeypatch, model, whole, tmp_path, capfd, waits, error):
    monkeypatch.setattr(ModelSaver, "_save_settings", fail_exports(1, error))
    keep = ["trainer.max_ckpt_to_keep=null", f"trainer.async_save={waits}"]
    assert run_here(*arguments(model, tmp_path, *keep)) == 0
    said = capfd.readouterr().out
    assert said.count("WARNING: the model of step_2 cannot be exported") == 1 and str(error) in said
    first = tmp_path / "out/checkpoints/step_2"
    assert sorted(path.name for path in first.iterdir()) == ["manifest.json", "state"] and verify(first) == ""
    assert (tmp_path / "out/checkpoints/step_4/huggingface/model.safetensors").is_file()
    assert not differences(whole / "out", tmp_path / "out")


@pytest.mark.parametrize("ranks", [1, 2])
def test_failed_last_export_is_one_message_and_resume_exports(warm, model, whole, tmp_path, ranks):
    setup = (f"{__name__}:never_export", {})
    end = warm.run(arguments(model, tmp_path), ranks=ranks, setup=setup)
    assert end.codes == [2] * ranks and end.output.count(f"error: the model of {tmp_path}") == 1, end.output
    assert "Traceback" not in end.output
    newest = tmp_path / f"out/checkpoints/step_{STEPS}"
    assert verify(newest) == "" and not (newest / "huggingface").exists()
    again = arguments(model, tmp_path, "trainer.resume_from=auto")
    assert warm.run(again, ranks=ranks, setup=setup).codes == [2] * ranks
    end = warm.run(again, ranks=ranks)
    assert end.code == 0 and f"The model is in {newest}/huggingface" in end.output, end.output
    assert verify(newest) == "" and "huggingface/model.safetensors" in read_manifest(newest)["files"]
    if ranks == 1:
        assert not differences(whole / "out", tmp_path / "out")
    assert warm.run(again, ranks=ranks).code == 0


def never_export(rank: int) -> None:
    """A setup: no export succeeds."""
    ModelSaver._save_settings = fail_exports(1000, ValueError("odd"))


def never_export_and_stop(rank: int) -> None:
    """A setup: no export succeeds, and the run is stopped in its first step."""
    never_export(rank)
    send_signal_at(rank, "forward", on_rank=0, call=1, sends=signal.SIGTERM)


def test_stopped_run_whose_export_fails_exits_with_75(warm, model, tmp_path):
    end = warm.run(arguments(model, tmp_path), setup=(f"{__name__}:never_export_and_stop", {}))
    assert end.code == 75 and "cannot be exported" in end.output, end.output
    assert metrics(tmp_path / "out")[-1]["step"] == 1 and (tmp_path / "out/checkpoints/step_1/state").is_dir()


def test_merged_model_in_bf16_is_compared_with_its_own_rounded_weights(tmp_path, monkeypatch):
    """The weights are the same on both sides: rotary frequencies must not have been rounded with them."""
    folder = tiny.build_model(tmp_path / "model", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    LlamaForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    found = []
    monkeypatch.setattr(
        huggingface, "require_same_logits", lambda expected, saved, action: found.append((expected, saved))
    )
    assert run_here(*arguments(folder, tmp_path / "run", SHORT, *MERGED)) == 0
    assert found
    for expected, saved in found:
        torch.testing.assert_close(saved, expected, rtol=1e-6, atol=1e-7)
