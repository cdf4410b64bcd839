"""What is chosen about the data is what is trained, and what is saved renders what was trained."""

import json

import numpy as np
from transformers import AutoTokenizer

from sft_recipe.config.compose import load_config
from sft_recipe.data.run_inputs import prepare
from tests.support import tiny
from tests.support.runs import metrics, run_here

SHOUTING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
)


def write(path, count, word):
    records = [{"prompt": f"{word} {n}?", "response": f"{word}, {n} times."} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def overrides(tmp_path, *extra):
    return [
        f"model.path={tmp_path}/model",
        f"data.cache_dir={tmp_path}/cache",
        f"trainer.output_dir={tmp_path}/out",
        "trainer.device=cpu",
        *extra,
    ]


def prepared(tmp_path, *extra):
    return prepare(load_config(overrides(tmp_path, *extra)), 0, say=lambda text: None)


def texts(prepared, examples):
    return [prepared.tokenizer.decode(examples[index][0]) for index in range(len(examples))]


def test_mixture_trains_the_requested_numbers_of_examples(tmp_path):
    tiny.build_model(tmp_path / "model")
    one, two = write(tmp_path / "one.jsonl", 40, "Hello"), write(tmp_path / "two.jsonl", 5, "Paris")
    spec = f"data.train_files=['{one}*0.25','{two}#12']"
    found = prepared(tmp_path, spec)
    counts = {word: sum(word in text for text in texts(found, found.train)) for word in ("Hello", "Paris")}
    assert counts == {"Hello": 10, "Paris": 12}
    assert [(item.examples, item.target_count) for item in found.source_counts] == [(40, 10), (5, 12)]
    assert prepared(tmp_path, spec).train.fingerprint == found.train.fingerprint
    assert prepared(tmp_path, spec, "trainer.seed=7").train.fingerprint != found.train.fingerprint
    split = prepared(tmp_path, spec, "data.val_ratio=0.3")
    held_out, trained = set(texts(split, split.validation[""])), set(texts(split, split.train))
    assert held_out and not held_out & trained
    assert held_out | trained == set(texts(found, found.train))


def test_validation_examples_that_are_also_trained_on_are_counted(tmp_path, capsys):
    tiny.build_model(tmp_path / "model")
    data, other = write(tmp_path / "one.jsonl", 20, "Hello"), write(tmp_path / "two.jsonl", 5, "Paris")
    sets = [f"data.train_files='{data}#12'", f"data.val_files={{same: '{data}#4', other: {other}}}"]
    assert run_here(*overrides(tmp_path, *sets, "trainer.total_training_steps=1")) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    found = prepared(tmp_path, *sets)
    both = set(texts(found, found.train)) & set(texts(found, found.validation["same"]))
    assert both and f"same: 4 examples ({len(both)} of them are also trained on), other: 5 examples" in said


def test_resume_with_another_mixture_is_refused(tmp_path, capfd):
    tiny.build_model(tmp_path / "model")
    data = write(tmp_path / "one.jsonl", 20, "Hello")
    steps = ["data.train_batch_size=2", "trainer.total_training_steps=1"]
    assert run_here(*overrides(tmp_path, *steps, f"data.train_files={data}")) == 0
    steps[-1] = "trainer.total_training_steps=2"
    halved = [*steps, f"data.train_files={data}*0.5", "trainer.resume_from=auto"]
    assert run_here(*overrides(tmp_path, *halved)) == 2
    assert "data" in capfd.readouterr().err
    assert run_here(*overrides(tmp_path, *steps, f"data.train_files={data}", "trainer.resume_from=auto")) == 0
    assert len(metrics(tmp_path / "out")) == 2


def test_saved_template_is_the_one_of_training(tmp_path):
    tiny.build_model(tmp_path / "model")
    (tmp_path / "own.jinja").write_text(SHOUTING)
    data = write(tmp_path / "one.jsonl", 4, "Hello")
    own = ["data.train_batch_size=2", "trainer.total_training_steps=1", f"model.chat_template={tmp_path}/own.jinja"]
    own.append(f"data.train_files={data}")
    assert run_here(*overrides(tmp_path, *own)) == 0
    saved = AutoTokenizer.from_pretrained(tmp_path / "out/checkpoints/step_1/huggingface")
    trained = prepared(tmp_path, *own).train
    for index, line in enumerate(data.read_text().splitlines()):
        record = json.loads(line)
        turns = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["response"]}]
        ids = saved.apply_chat_template(turns)["input_ids"]
        assert ids == trained[index][0].tolist()
        assert saved.decode(np.asarray(ids)[trained[index][1] == 1]) == record["response"] + "<|im_end|>"
