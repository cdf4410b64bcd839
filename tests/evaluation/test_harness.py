"""scripts/evaluate.py: scores equal those computed by hand, and every mistake is one message."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_recipe.cli.evaluate import main
from sft_recipe.config import preflight
from sft_recipe.errors import pip_install
from sft_recipe.evaluation.harness import TaskResult
from tests.support import tiny
from tests.support.runs import run_here
from tests.support.small_run import arguments

QUESTIONS = [
    {"question": "What is 3 and 3?", "choices": ["It is 6.", "It is 8.", "Paris, the capital of France."], "answer": 0},
    {"question": "What is 4 and 4?", "choices": ["It is 6.", "It is 8.", "I am fine, thank you."], "answer": 1},
    {"question": "你好", "choices": ["很好，谢谢。", "fox", "It is 2."], "answer": 0},
    {"question": "The quick brown", "choices": [" fox jumps", "机器学习", "dog"], "answer": 2},
]
TASK = {
    "task": "tiny_choice",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.build_model(tmp_path_factory.mktemp("harness") / "model")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the definition of a task over a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    files = {"dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}}}
    (folder / "tiny_choice.yaml").write_text(yaml.safe_dump(TASK | files))
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def needs_lm_eval():
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[eval]'")


def evaluate(capsys, *args):
    code = main([*map(str, args), "--device", "cpu", "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def chosen_by_hand(model, tokenizer, question, shots=()):
    """The choice with the largest sum of log-probabilities, one forward pass each."""
    context = "".join(f"{shot['question']} {shot['choices'][shot['answer']]}\n\n" for shot in shots)
    scores = []
    for choice in question["choices"]:
        text = context + question["question"]
        before, all_ids = (tokenizer(part).input_ids for part in (text, f"{text} {choice}"))
        assert all_ids[: len(before)] == before
        with torch.no_grad():
            logs = model(torch.tensor([all_ids])).logits[0].float().log_softmax(-1)
        scores.append(sum(logs[at - 1, all_ids[at]].item() for at in range(len(before), len(all_ids))))
    return max(range(len(scores)), key=scores.__getitem__)


def accuracy_by_hand(model, tokenizer, questions=QUESTIONS):
    return sum(chosen_by_hand(model.eval(), tokenizer, one) == one["answer"] for one in questions) / len(questions)


@pytest.mark.usefixtures("needs_lm_eval")
@pytest.mark.parametrize("lora", [False, True])
def test_scores_of_a_run_are_those_computed_by_hand(model, tasks, tmp_path, capsys, lora):
    extra = ["lora.enabled=true", "optim.lr=5e-2"] if lora else ["optim.lr=3e-2"]
    assert run_here(*arguments(model, tmp_path, "trainer.total_training_steps=4", *extra)) == 0
    capsys.readouterr()
    run, export = tmp_path / "out", (tmp_path / "out/checkpoints/best").resolve() / "huggingface"
    plain = AutoModelForCausalLM.from_pretrained(model if lora else export, dtype=torch.float32)
    trained = PeftModel.from_pretrained(plain, export) if lora else plain
    wanted = accuracy_by_hand(trained, AutoTokenizer.from_pretrained(export))
    report = evaluate(capsys, run, "--tasks", "tiny_choice", "--include_path", tasks)
    result = report["tasks"]["tiny_choice"]
    assert result["scores"]["acc"]["value"] == wanted
    assert result["scores"]["acc"]["stderr"] == pytest.approx((wanted * (1 - wanted) / 3) ** 0.5)
    assert (result["samples"], result["version"], result["num_fewshot"]) == (4, 3, 0)
    assert report["checkpoint"] == export.parent.name and (report["adapter"] is not None) == lora
    assert report["settings"]["device"] == "cpu" and report["versions"]["lm_eval"]
    (path,) = (run / "evaluations").iterdir()
    assert path.name.startswith(f"{export.parent.name}-") and json.loads(path.read_text()) == report


def test_results_are_shown_also_where_they_cannot_be_written(tmp_path, capsys, monkeypatch):
    source = SimpleNamespace(checkpoint=tmp_path / "run/checkpoints/step_1", adapter=None)  # there is no such folder
    monkeypatch.setattr("sft_recipe.config.preflight.is_installed", lambda name: True)
    monkeypatch.setattr("sft_recipe.chat.source.find_source", lambda *_: source)
    monkeypatch.setattr("sft_recipe.chat.loading.load_settings", lambda *_: (None, None))
    monkeypatch.setattr("sft_recipe.chat.loading.load_module", lambda *_: SimpleNamespace(dtype=torch.float32))
    monkeypatch.setattr("sft_recipe.evaluation.harness.find_tasks", lambda *_: None)
    found = {"mine": TaskResult(1, 0, 4, {"acc": (0.75, None)})}
    monkeypatch.setattr("sft_recipe.evaluation.harness.run_tasks", lambda *_: found)
    monkeypatch.setattr("sft_recipe.cli.evaluate.version", lambda name: "1")
    assert main(["run", "--tasks", "mine", "--device", "cpu"]) == 2
    out, error = capsys.readouterr()
    assert "0.7500" in out and "cannot be written: No such file or directory; the results are above" in error


@pytest.mark.usefixtures("needs_lm_eval")
def test_limit_examples_before_the_question_and_table(model, tasks, capsys):
    few = evaluate(capsys, model, "--tasks", "tiny_choice", "--include_path", tasks, "--limit", 2, "--num_fewshot", 1)
    result = few["tasks"]["tiny_choice"]
    assert (result["samples"], result["num_fewshot"]) == (2, 1) and few["checkpoint"] is None
    assert few["settings"]["limit"] == 2 and few["settings"]["num_fewshot"] == 1
    assert not (model / "evaluations").exists()
    assert main([str(model), "--tasks", "tiny_choice", "--include_path", str(tasks), "--device", "cpu"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "tiny_choice" in line)
    wanted = accuracy_by_hand(AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model))
    assert row.replace("│", " ").split()[:6] == ["tiny_choice", "3", "0", "4", "acc", f"{wanted:.4f}"]


@pytest.mark.parametrize("flag", [[], ["--apply_chat_template"]])
def test_the_chat_template_is_applied_on_request(model, monkeypatch, capsys, flag):
    """With a stub in the place of lm_eval."""
    given = {}

    def simple_evaluate(model, **arguments):
        given.update(arguments)
        facts = {"n-samples": {"mine": {"effective": 4}}, "versions": {"mine": 1}, "n-shot": {"mine": 0}}
        return {"results": {"mine": {"acc,none": 0.75}}, **facts}

    manager = SimpleNamespace(TaskManager=lambda include_path: SimpleNamespace(all_tasks=["mine"]))
    evaluator = SimpleNamespace(simple_evaluate=simple_evaluate)
    huggingface = SimpleNamespace(HFLM=lambda module, **_: module)
    stubs = {"tasks": manager, "evaluator": evaluator, "models": SimpleNamespace(), "models.huggingface": huggingface}
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace())
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, f"lm_eval.{name}", stub)
    monkeypatch.setattr("sft_recipe.cli.evaluate.version", lambda name: "1")
    report = evaluate(capsys, model, "--tasks", "mine", *flag)
    assert given["apply_chat_template"] is bool(flag) and report["settings"]["apply_chat_template"] is bool(flag)
    assert report["tasks"]["mine"]["scores"]["acc"]["value"] == 0.75


def test_a_model_without_a_chat_template_is_refused(model, monkeypatch, capsys):
    monkeypatch.setattr("sft_recipe.chat.loading.load_settings", lambda *_: (None, SimpleNamespace(chat_template=None)))
    monkeypatch.setattr(preflight, "is_installed", lambda name: True)
    monkeypatch.setattr("sft_recipe.evaluation.harness.find_tasks", lambda *_: None)
    assert main([str(model), "--tasks", "mine", "--device", "cpu", "--apply_chat_template"]) == 2
    assert "has no chat template; leave the flag out" in capsys.readouterr().err


NO_DATA = yaml.safe_dump(TASK | {"task": "broken", "dataset_kwargs": {"data_files": {"test": "/nowhere.jsonl"}}})


@pytest.mark.usefixtures("needs_lm_eval")
@pytest.mark.parametrize(
    ("args", "broken", "message"),
    [
        (["MODEL", "--tasks", "tiny_choise"], NO_DATA, "no task tiny_choise; did you mean tiny_choice?"),
        (["MODEL", "--tasks", "broken"], NO_DATA, "--tasks broken: Unable to find '/nowhere.jsonl'"),
        (["MODEL", "--tasks", "broken"], "task: [", "broken"),
        (["MODEL", "--tasks", "broken"], "task: broken\n", "broken"),
        (["/nowhere/model", "--tasks", "tiny_choice"], NO_DATA, "there is no model at /nowhere/model"),
        (["MODEL", "--tasks", "tiny_choice", "--num_fewshot", "9"], NO_DATA, "--tasks tiny_choice: "),
    ],
)
def test_mistakes_of_tasks_are_one_line(model, tasks, tmp_path, capsys, args, broken, message):
    folder = Path(shutil.copytree(tasks, tmp_path / "tasks"))
    (folder / "broken.yaml").write_text(broken)
    words = [str(model) if word == "MODEL" else word for word in args]
    assert main([*words, "--include_path", str(folder), "--device", "cpu"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["MODEL"], "required: --tasks"),
        (["MODEL", "--tasks", ""], "--tasks needs a value"),
        (["MODEL", "--tasks", "a,,b"], "--tasks has an empty name: 'a,,b'"),
        (["MODEL", "--tasks", "a", "--limit", "0"], "--limit is 0; it must be a whole number from 1"),
        (["MODEL", "--tasks", "a", "--limit", "0.5"], "--limit"),
        (["MODEL", "--tasks", "a", "--num_fewshot", "-1"], "--num_fewshot is -1"),
        (["MODEL", "--tasks", "a", "--include_path", "/nowhere"], "there is no folder /nowhere"),
        (["MODEL", "--tasks", "a", "--enable_thinking", "true"], "unknown flag --enable_thinking"),
    ],
)
def test_invalid_command_lines_are_one_line(model, args, message, capsys):
    assert main([str(model) if word == "MODEL" else word for word in args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_missing_model_is_named_before_a_missing_package(monkeypatch, capsys):
    monkeypatch.setattr(preflight, "is_installed", lambda name: name != "lm_eval")
    assert main(["/nowhere/run", "--tasks", "arc_easy"]) == 2
    assert "there is no model at /nowhere/run" in capsys.readouterr().err


def test_missing_package_is_one_message(model, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "is_installed", lambda name: name != "lm_eval")
    assert main([str(model), "--tasks", "arc_easy"]) == 2
    command = pip_install("-e '.[eval]'")
    assert capsys.readouterr().err == f"error: lm-evaluation-harness is not installed: {command}\n"
