"""The first step verifies itself: a model whose loss is not that of plain transformers is not trained."""

import json
import re

import pytest
import torch

from sft_recipe.engine.cpu.platform import use_cpu
from tests.support import tiny
from tests.support.plain import plain_loss
from tests.support.runs import metrics, run_here

RECORDS = [
    {"prompt": "Hello there, how are you?", "response": "I am fine, thank you."},
    {"prompt": "What is the capital of France?", "response": "Paris, which lies on the Seine. " * 4},
    {"prompt": "1 2 3", "response": "4 5 6 7 8 9 0"},
]


def arguments(folder, name="out", *extra):
    (folder / "data.json").write_text(json.dumps(RECORDS))
    return [
        f"model.path={folder}/model", f"data.train_files={folder}/data.json", f"data.cache_dir={folder}/cache",
        f"trainer.output_dir={folder}/{name}", "trainer.device=cpu", "trainer.total_training_steps=1",
        "data.max_length=192", "fsdp.mixed_precision.param_dtype=fp32", *extra,
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    tiny.build_model(tmp_path / "model")
    return tmp_path


def verified(output):
    found = re.search(r"loss verified against plain transformers \(difference (\S+)\)", output)
    return found and float(found[1])


def test_the_banner_says_that_the_loss_is_verified(folder, capsys):
    assert run_here(*arguments(folder)) == 0
    assert verified(capsys.readouterr().out) < 1e-5
    assert metrics(folder / "out")[0]["train/loss"] == pytest.approx(plain_loss(folder / "model", RECORDS), rel=1e-6)


def test_few_tokens_may_differ_more_than_many():
    """In bf16, the losses of SmolLM2-135M differed by 4% over three tokens, and by at most 1% over 8 to 12."""
    use_cpu()
    from sft_recipe.engine.model_checks import tolerance

    for dtype in (torch.bfloat16, torch.float16):
        assert tolerance(dtype, 100) == tolerance(dtype, 10**6) == 2e-2
        assert tolerance(dtype, 4) == pytest.approx(5 * 2e-2)  # a 25th of the tokens
        assert tolerance(dtype, 1) == pytest.approx(10 * 2e-2)
    assert tolerance(torch.float32, 1) == tolerance(torch.float32, 10**6) == 1e-4


def test_verification_can_be_switched_off(folder, capsys):
    assert run_here(*arguments(folder, "out", "model.verify_first_step=false")) == 0
    assert "loss not verified" in capsys.readouterr().out


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_with_different_numbers_of_documents_verify_together(folder, warm, ranks):
    end = warm.run(arguments(folder, f"out-{ranks}", "fsdp.mixed_precision.param_dtype=bf16"), ranks=ranks)
    assert end.code == 0, end.output
    assert verified(end.output) < 2e-2


def test_a_resumed_run_is_verified_too(folder, capsys):
    assert run_here(*arguments(folder)) == 0
    capsys.readouterr()
    assert run_here(*arguments(folder, "out", "trainer.total_training_steps=2", "trainer.resume_from=auto")) == 0
    assert verified(capsys.readouterr().out) < 1e-5


def test_a_loss_that_only_training_cannot_compute_is_an_error(folder, capfd, monkeypatch):
    use_cpu()
    from sft_recipe.engine.sft_engine import SFTEngine

    real = SFTEngine.micro_batch_loss

    def loss(self, micro_batch, *rest, **more):
        found, correct = real(self, micro_batch, *rest, **more)
        return found * (float("nan") if len(micro_batch.targets) > 4 else 1), correct  # not in the probes

    monkeypatch.setattr(SFTEngine, "micro_batch_loss", loss)
    assert run_here(*arguments(folder)) == 2
    assert "the loss of the first micro-batch is nan, but plain transformers computes" in capfd.readouterr().err


def test_attention_that_leaks_is_an_error_with_both_losses(folder, capfd, monkeypatch):
    """Documents are isolated while the probe looks, and not in the batch."""
    use_cpu()
    from sft_recipe.engine.attention import packed

    original = packed._attend_per_segment

    def leaks(attend_one, query, key, value, documents):
        if documents.longest > 20:
            value = value * 2
        return original(attend_one, query, key, value, documents)

    monkeypatch.setattr(packed, "_attend_per_segment", leaks)
    assert run_here(*arguments(folder)) == 2
    error = capfd.readouterr().err
    expected = plain_loss(folder / "model", RECORDS)
    found = re.search(
        r"the loss of the first micro-batch is (\S+), but plain transformers computes (\S+) for Llama", error
    )
    assert float(found[2]) == pytest.approx(expected, abs=1e-5) and float(found[1]) != pytest.approx(expected, abs=1e-4)
    assert not (folder / "out/metrics.jsonl").exists()


def test_verification_draws_no_random_number(folder):
    """Dropout is off on both sides, and the weights after the step are those of a run that did not verify."""
    from safetensors.torch import load_file

    extra = ["model.override_config={attention_dropout: 0.3}"]
    for value in ("true", "false"):
        assert run_here(*arguments(folder, value, *extra, f"model.verify_first_step={value}")) == 0
    weights = [
        load_file(folder / name / "checkpoints/step_1/huggingface/model.safetensors") for name in ("true", "false")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_model_computes_in_a_mode_of_verl_only(folder, monkeypatch):
    """Outside of it the weights may be offloaded, and ranks that share a sequence do not know each other."""
    use_cpu()
    from sft_recipe.engine.sft_engine import SFTEngine

    build, modes = SFTEngine._build_fsdp_module, []

    def watched(self, module):
        built = build(self, module)
        self.mode = None
        self.model.get_decoder().register_forward_pre_hook(lambda *_: modes.append(self.mode))
        return built

    monkeypatch.setattr(SFTEngine, "_build_fsdp_module", watched)
    (folder / "val.json").write_text(json.dumps(RECORDS))
    extra = [f"data.val_files={folder}/val.json", "eval.generate=2", "eval.max_new_tokens=3"]
    assert run_here(*arguments(folder, "out", *extra)) == 0
    assert set(modes) == {"train", "eval"} and len(modes) > 10


def test_the_reference_sums_the_loss_of_a_part_of_the_tokens_at_a_time(monkeypatch):
    use_cpu()
    from sft_recipe.engine import model_checks

    sizes, original = [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        model_checks.F,
        "cross_entropy",
        lambda part, *more, **named: sizes.append(len(part)) or original(part, *more, **named),
    )
    monkeypatch.setitem(model_checks.SOFTMAX_CHUNK, "cpu", 4 * 32)
    logits, targets = torch.randn(10, 32).bfloat16(), torch.arange(10)
    expected = -logits.double().log_softmax(1)[torch.arange(10), targets].sum()
    assert float(model_checks._summed_loss(logits, targets)) == pytest.approx(float(expected), rel=1e-6)
    assert sizes == [4, 4, 2]
