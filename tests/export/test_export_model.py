"""scripts/export_model.py: what it writes is the trained model, and it verifies that itself."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sft_recipe.cli.export import main
from sft_recipe.engine.cpu.platform import use_cpu
from tests.support import tiny
from tests.support.runs import ROOT, metrics, run_here
from tests.support.small_run import STEPS, arguments

use_cpu()

LORA = ["lora.enabled=true", "lora.target_modules=[q_proj,down_proj,lm_head]"]
IDS = torch.arange(3, 60)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def full(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    assert run_here(*arguments(base, folder)) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    assert run_here(*arguments(base, folder, *LORA)) == 0
    return folder / "out"


def export(*args) -> int:
    """Run the command; a connection to any address fails."""

    def refuse(*_):
        raise AssertionError("a network was contacted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        return main([str(arg) for arg in args])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.float().eval()(IDS).logits


def plain(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def adapted(base: Path, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_export_says_that_rounding_undoes_training(base, tmp_path, capsys, dtype):
    """Each weight was trained from a number of bfloat16 by 0.49 of the step to the next one."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).float()
    for weight in model.parameters():
        weight.data += 2.0 ** (torch.frexp(weight.data).exponent - 8) * 0.49
    trained = shutil.copytree(base, tmp_path / "trained")
    model.save_pretrained(trained)
    assert export(trained, "--out", tmp_path / "out", "--dtype", dtype, "--json") == 0
    remarks = json.loads(capsys.readouterr().out)["remarks"]
    assert len(remarks) == (dtype == "bfloat16")
    for remark in remarks:
        assert "is lost in this export; --dtype float32 keeps it" in remark
        assert remark in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("template", "reason"),
    [("{{", "unexpected 'end of template'"), ("{{ raise_exception('no system') }}", "no system")],
)
def test_template_that_cannot_be_used_is_one_message(base, tmp_path, capsys, template, reason):
    model = shutil.copytree(base, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    assert export(model, "--out", tmp_path / "out") == 2
    assert f"cannot render a question: {reason}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_full_model_is_the_checkpoint(full, tmp_path, capsys):
    out = tmp_path / "deep/er/out"
    assert export(full, "--out", out, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    checkpoint = full / f"checkpoints/step_{STEPS}/huggingface"
    assert torch.equal(plain(out), plain(checkpoint))
    end = AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(out).eos_token_id == end
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny.CHATML
    verification = result["verification"]
    assert verification["largest_difference"] == 0 and verification["same_choices"] == verification["tokens"] == 128
    assert result["files"] == {path.name: path.stat().st_size for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "README.md"} <= set(
        result["files"]
    )
    assert (out / "model.safetensors").stat().st_mode & 0o077 == (out / "README.md").stat().st_mode & 0o077


def test_card_names_the_model_that_was_trained_and_the_held_out_examples(full, tmp_path):
    """The default model may have been replaced by its fallback: the configuration names both."""
    run = shutil.copytree(full, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    base = Path(config["model"]["path"]).name
    config["model"]["path"], config["data"]["val_files"], config["data"]["val_ratio"] = "owner/default", None, 0.05
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert export(run, "--out", tmp_path / "out") == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "owner/default" not in card and f"fine-tuned from `{base}`" in card
    assert "| validation | 0.05 of the examples, held out |" in card


def test_card_has_data_settings_scores_and_verification(full, tmp_path):
    assert export(full, "--out", tmp_path / "out") == 0
    card = (tmp_path / "out/README.md").read_text()
    matter = yaml.safe_load(card.split("---")[1])
    assert matter["pipeline_tag"] == "text-generation" and matter["library_name"] == "transformers"
    assert "base_model" not in matter and str(full.parent) not in card  # no folder of this machine
    assert "| training files | train.json |" in card and "| learning rate | 0.01 |" in card
    assert f"| val/loss | {metrics(full)[-1]['val/loss']:.6g} |" in card
    assert "| same greedy tokens | 128 of 128 |" in card
    assert "| strategy | no FSDP (one CPU rank holds the complete model) |" in card


@pytest.mark.parametrize("facts", ["", "[]", "{}", '{"strategy": 3}'])
def test_card_of_a_run_that_did_not_record_its_strategy_has_the_configured_one(full, tmp_path, facts):
    run = shutil.copytree(full, tmp_path / "run")
    (run / "run.json").write_text(facts)
    assert export(run, "--out", tmp_path / "out") == 0
    assert "| strategy | fsdp |" in (tmp_path / "out/README.md").read_text()


def test_findings_of_the_run_are_in_the_card(full, tmp_path, monkeypatch):
    (full / "findings.json").write_text(json.dumps(["The learning rate is too high."]))
    assert export(full, "--out", tmp_path / "out") == 0
    (full / "findings.json").unlink()
    assert "## Findings\n\n- The learning rate is too high.\n" in (tmp_path / "out/README.md").read_text()


def test_merged_weights_are_the_formula(base, lora, tmp_path):
    """W + alpha / rank * B A in double precision, from the files; the head was tied and is not any longer."""
    assert export(lora, "--merge", "--out", tmp_path / "out") == 0
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    trained = load_file(lora / f"checkpoints/step_{STEPS}/huggingface/adapter_model.safetensors")
    before["lm_head.weight"] = before["model.embed_tokens.weight"]
    assert before.keys() == after.keys()
    for name, weight in before.items():
        key = "base_model.model." + name.removesuffix("weight")
        expected = weight.double()
        if f"{key}lora_A.weight" in trained:
            expected += 2 * trained[f"{key}lora_B.weight"].double() @ trained[f"{key}lora_A.weight"].double()
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    found = plain(tmp_path / "out")
    torch.testing.assert_close(
        found, adapted(base, lora / f"checkpoints/step_{STEPS}/huggingface"), atol=1e-5, rtol=1e-4
    )
    assert (found - plain(base)).abs().max() > 1e-2  # the adapter has an effect


def test_adapter_alone_loads_over_its_base(base, lora, tmp_path):
    assert export(lora, "--out", tmp_path / "out") == 0
    assert not (tmp_path / "out/config.json").exists()
    checkpoint = lora / f"checkpoints/step_{STEPS}/huggingface"
    assert torch.equal(adapted(base, tmp_path / "out"), adapted(base, checkpoint))
    assert "AutoPeftModelForCausalLM" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_model_of_two_ranks_is_exported_by_one_process(warm, base, tmp_path, strategy):
    settings = ["lora.enabled=true", "trainer.total_training_steps=2", f"fsdp.strategy={strategy}"]
    assert warm.run(arguments(base, tmp_path, *settings), ranks=2).codes == [0, 0]
    assert export(tmp_path / "out", "--merge", "--out", tmp_path / "exported") == 0
    expected = adapted(base, tmp_path / "out/checkpoints/step_2/huggingface")
    torch.testing.assert_close(plain(tmp_path / "exported"), expected, atol=1e-5, rtol=1e-4)


def test_rounding_and_shards(full, tmp_path):
    assert export(full, "--dtype", "bfloat16", "--shard_size", "20kB", "--out", tmp_path / "out") == 0
    stored = load_file(full / f"checkpoints/step_{STEPS}/huggingface/model.safetensors")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    found = {name: value for path in files for name, value in load_file(path).items()}
    assert found.keys() == stored.keys() and len(files) > 2
    assert all(torch.equal(found[name], value.to(torch.bfloat16)) for name, value in stored.items())
    contents = [sum(value.nbytes for value in load_file(path).values()) for path in files]
    largest = max(value.nbytes for value in found.values())
    assert all(size <= max(20_000, largest) for size in contents)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys() and index["metadata"]["total_size"] == sum(contents)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16


def test_adapter_made_elsewhere(base, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, use_dora=True, target_modules=["k_proj", "embed_tokens"],
        init_lora_weights=False,
    )  # fmt: skip
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    expected = logits(made)
    made.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/nowhere/model"}))
    assert export("--adapter", tmp_path / "adapter", "--model", base, "--merge", "--out", tmp_path / "out") == 0
    torch.testing.assert_close(plain(tmp_path / "out"), expected, atol=1e-5, rtol=1e-4)
    assert export("--adapter", tmp_path / "adapter", "--model", base, "--out", tmp_path / "alone") == 0
    named = json.loads((tmp_path / "alone/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(base)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == tiny.build_tokenizer().eos_token_id


def test_step_best_and_newest(full, tmp_path, capsys):
    def exported(*args) -> torch.Tensor:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert export(full, *args, "--out", out) == 0
        return plain(out)

    best = full / "checkpoints/best"
    best.unlink(missing_ok=True)
    steps = {step: plain(full / f"checkpoints/step_{step}/huggingface") for step in (8, 10)}
    assert not torch.equal(steps[8], steps[10])
    assert torch.equal(exported(), steps[10]) and torch.equal(exported("--step", "8"), steps[8])
    best.symlink_to("step_8")
    assert torch.equal(exported(), steps[8])
    best.unlink()
    for folder in (full / "checkpoints/step_8", full / "checkpoints/step_8/huggingface"):
        assert main([str(folder), "--out", str(tmp_path / folder.name)]) == 0
        assert torch.equal(plain(tmp_path / folder.name), steps[8])


def test_an_export_that_is_not_the_model_is_an_error(full, tmp_path, monkeypatch, capsys):
    from sft_recipe.export import hf_folder

    def corrupt(weights, folder, *rest):
        write(weights, folder, *rest)
        stored = load_file(folder / "model.safetensors")
        stored["model.layers.1.mlp.down_proj.weight"].neg_()
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    write = hf_folder.write_weights
    monkeypatch.setattr(hf_folder, "write_weights", corrupt)
    assert export(full, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "the export is not the trained model" in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_more_difference_than_rounding_is_known_to_cause_names_the_flag_that_does_not_round(
    lora, tmp_path, monkeypatch, capsys
):
    from sft_recipe.export import verification

    monkeypatch.setattr(verification, "ROUNDINGS", -1)
    assert export(lora, "--merge", "--dtype", "bfloat16", "--out", tmp_path / "out") == 2
    assert "If this is the rounding to bfloat16, --dtype float32 passes" in capsys.readouterr().err
    assert export(lora, "--merge", "--dtype", "float32", "--out", tmp_path / "out") == 0


def test_a_merge_that_does_not_merge_is_an_error(lora, tmp_path, monkeypatch, capsys):
    from peft.tuners.lora.layer import Linear

    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: torch.zeros_like(self.weight))
    assert export(lora, "--merge", "--out", tmp_path / "out") == 2
    assert "changed what it computes by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def damage(run: Path) -> Path:
    path = run / f"checkpoints/step_{STEPS}/huggingface/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return run


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name what to export"),
        (["FULL", "--adapter", "x"], "one of them"),
        (["/nowhere"], "there is no folder /nowhere"),
        (["EMPTY"], "is no run folder"),
        (["FULL", "--step", "3"], "has no step_3; it has step_8, step_10"),
        (["BASE", "--step", "3"], "needs a run folder"),
        (["FULL", "--merge"], "no adapter to merge"),
        (["FULL", "--model", "BASE"], "is a complete model"),
        (["--adapter", "BASE"], "has no adapter_config.json"),
        (["--adapter", "ADAPTER", "--model", "/nowhere/base"], "there is no model at /nowhere/base"),
        (["--adapter", "ADAPTER", "--model", "some/base"], "cannot be reached"),
        (["--adapter", "ADAPTER", "--model", "OTHER"], "cannot be loaded over its base model"),
        (["FULL", "--shard_size", "5"], "expected a size such as 24GB"),
        (["FULL", "--dtype", "int8"], "invalid choice"),
        (["FULL", "--step", "x"], "--step"),
        (["DAMAGED"], "does not have its checksum"),
        (["STATE"], "has no model"),
    ],
)
def test_invalid_input_is_one_message_and_code_2(args, message, base, full, lora, tmp_path, capsys):
    import shutil

    places = {"BASE": base, "FULL": full, "EMPTY": tmp_path / "empty"}
    places["ADAPTER"] = lora / f"checkpoints/step_{STEPS}/huggingface"
    (tmp_path / "empty").mkdir()
    if "OTHER" in args:
        places["OTHER"] = tiny.build_model(tmp_path / "other", hidden_size=16)
    if "DAMAGED" in args:
        places["DAMAGED"] = damage(Path(shutil.copytree(full, tmp_path / "damaged", symlinks=True)))
    if "STATE" in args:
        places["STATE"] = Path(shutil.copytree(full, tmp_path / "state", symlinks=True))
        shutil.rmtree(places["STATE"] / f"checkpoints/step_{STEPS}/huggingface")
    before = set(tmp_path.iterdir())
    assert main([str(places.get(word, word)) for word in [*args, "--out", str(tmp_path / "out")]]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and message in error and "Traceback" not in error, error
    assert set(tmp_path.iterdir()) == before


def test_folder_that_holds_something_is_not_overwritten(full, tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("mine")
    assert export(full, "--out", tmp_path) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_script_as_a_user_calls_it(full, tmp_path):
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    command = [ROOT / "scripts/export_model.py", full, "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "verified: over 8 prompts" in done.stdout and (tmp_path / "out/model.safetensors").is_file()
    assert done.stderr == ""
