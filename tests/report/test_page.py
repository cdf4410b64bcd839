"""The pages of runs: what they show, hostile text, odd runs, both languages, and what a browser may run."""

import base64
import hashlib
import json
import math
import re
import statistics
from dataclasses import replace

import pytest
import yaml

from sft_recipe.report.chinese_page import CHINESE_PAGE
from sft_recipe.report.compare import as_json, comparison_page, names, results
from sft_recipe.report.page import run_page
from sft_recipe.report.run import Run, read_run
from sft_recipe.report.summary import summary
from sft_recipe.tracking.run_facts import add_facts, write_facts
from tests.report.made import falling, make_run, noisy, write_run
from tests.support.html import NASTY, StrictParser
from tests.support.runs import ROOT

PACKAGE = ROOT / "sft_recipe/report"
GOOD = noisy(falling(60))
VALIDATION = {0: 2.5, 20: 1.9, 40: 1.7, 60: 1.8}


def full_run(**settings) -> Run:
    """Return a run with all that a page can show; its answers changed."""
    run = make_run(GOOD, validation=VALIDATION, bleu={0: 3.0, 60: 21.5}, answers=[("Yes, I do.", False)], **settings)
    after = run.samples[0]
    before = after | {"step": 0, "samples": [after["samples"][0] | {"answer": "Nothing at all.", "is_truncated": True}]}
    return replace(run, samples=[before, after])


def text_of(page: str) -> str:
    return " ".join(" ".join(StrictParser(page).text).split())


def test_a_page_shows_the_run():
    text = text_of(run_page(full_run()))
    assert "step 60 of 60" in text and "The goals are reached" in text and "No problem was found." in text
    for shown in ("Training loss", "Validation loss 1.800 2.500 at the start", "BLEU-4 21.5 3.0 at the start"):
        assert shown in text
    assert "best at step 40" in text
    assert text.index("Before, step 0 cut off Nothing at all.") < text.index("After, step 60 Yes, I do.")
    assert "./train.sh" in text and "trainer.total_training_steps" in text


def test_the_numbers_are_those_of_the_rows():
    facts = summary(full_run())
    assert facts["train_loss"]["last"] == pytest.approx(statistics.fmean(GOOD[-7:]))
    assert facts["scores"]["val/loss"] == {"first": 2.5, "last": 1.8, "best": 1.7, "best_step": 40}
    assert facts["scores"]["eval/bleu4"]["best"] == 21.5
    assert (facts["tokens"], facts["supervised_tokens"], facts["tokens_per_s"]) == (60_000, 18_000, 5000)
    assert json.loads(json.dumps(facts)) == facts


def test_the_training_loss_says_of_how_many_steps_it_is_the_mean():
    first, last = (f"{statistics.fmean(part):.4g}" for part in (GOOD[:7], GOOD[-7:]))
    for language, text in (
        ("en", f"Training loss {last} mean of the last 7 steps; {first} in the first 7"),
        ("zh", f"训练损失 {last} 最后 7 步的均值；最初 7 步为 {first}"),
    ):
        assert text in text_of(run_page(full_run(), language))
    short = make_run([2.0, 1.5])
    assert "Training loss 1.5 2 at the start" in text_of(run_page(short))
    for runs, name in (
        ([full_run()], "Training loss, mean of the last 7 steps"),
        ([short], "Training loss"),
        ([full_run(), short], "Training loss, mean of the last steps"),
    ):
        assert results(runs)[2].name == name


def test_a_higher_score_is_better_but_a_lower_loss():
    tiles = StrictParser(run_page(full_run())).attributes
    assert [value for name, value in tiles if name == "class" and value.startswith("tile ")][:3] == [
        "tile ", "tile good", "tile good",
    ]  # fmt: skip
    worse = make_run(GOOD, validation={0: 1.5, 60: 2.5}, bleu={0: 20.0, 60: 3.0})
    tiles = [value for name, value in StrictParser(run_page(worse)).attributes if name == "class"]
    assert tiles.count("tile bad") == 2


def test_memory_is_shown_beside_its_prediction(tmp_path):
    run = read_run(write_run(tmp_path / "run", full_run()))
    write_facts(run.folder, {"model": "tiny", "predicted_memory_gb": 1.25, "device": "CPU", "stopped_early": "enough"})
    text = text_of(run_page(run))
    add_facts(run.folder, {"peak_memory_gb": 1.75})  # of the complete run
    assert "Memory, GiB 1.75 predicted 1.25 GiB" in text_of(run_page(run))
    assert "Memory, GiB 1.5 predicted 1.25 GiB" in text and "Stopped early: enough" in text and "Device CPU" in text


def test_data_statistics_are_shown_where_the_run_has_them(tmp_path):
    run = read_run(write_run(tmp_path / "run", full_run()))
    assert "Repeated examples" not in text_of(run_page(run))
    found = {"examples": 1200, "tokens": 9000, "supervised": 3000, "repeated": 7, "dropped": 0, "format_version": 1}
    lengths = {"lengths": {"median": 5, "p95": 9, "max": 12}}
    (run.folder / "data.json").write_text(json.dumps(found | lengths))
    text = text_of(run_page(read_run(run.folder)))
    for shown in ("Examples 1,200", "3,000 (33%)", "median 5, p95 9, longest 12", "Repeated examples 7"):
        assert shown in text
    assert "Left out" not in text


def test_a_long_prompt_is_shown_without_its_middle():
    run = full_run()
    run.samples[1]["samples"][0]["prompt"] = f"Begin {'x' * 100_000} end?"
    page = run_page(run)
    assert "Begin xxx" in page and "xxx end?" in page and len(page) < 100_000


def test_benchmarks_are_shown_by_their_newest_result(tmp_path):
    run = read_run(write_run(tmp_path / "run", full_run()))
    (run.folder / "evaluations").mkdir()
    for name, time, value in (("b", "2024-01-01", 0.25), ("a", "2024-02-01", 0.5)):
        task = {
            "scores": {"acc": {"value": value, "stderr": 0.01}, "f1": {"value": None, "stderr": None}},
            "samples": 200,
        }
        report = {"checkpoint": "step_9", "time": time, "tasks": {"arc": task}}
        (run.folder / f"evaluations/step_9-{name}.json").write_text(json.dumps(report))
        (run.folder / f"evaluations/step_10-{name}.json").write_text(json.dumps(report | {"checkpoint": "step_10"}))
    for number, text in enumerate(("", "[]", '{"tasks": {"arc": 3}}')):
        (run.folder / f"evaluations/broken-{number}.json").write_text(text)
    text = text_of(run_page(run))
    assert (
        "arc acc step_9 0.5 0.01 200 arc acc step_10 0.5 0.01 200" in text and "0.25" not in text and "f1" not in text
    )
    assert [row.texts for row in results([run, full_run()]) if row.name == "arc, acc"] == [["0.5", ""]]


def hostile_run() -> Run:
    run = full_run(trainer__experiment_name=NASTY, data__train_files=[NASTY], model__path=NASTY)
    samples = [
        {
            "step": step,
            "samples": [dict.fromkeys(("set", "prompt", "reference", "answer"), NASTY) | {"is_truncated": True}],
        }
        for step in (0, 60)
    ]
    rows = [row | {f"val/{NASTY}/loss": 2.0} for row in run.rows]
    return replace(run, rows=rows, samples=samples)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_text_cannot_become_markup(language):
    for page in (run_page(hostile_run(), language), comparison_page([hostile_run(), full_run()], language)):
        parsed = StrictParser(page)
        assert not parsed.tags & {"img", "link", "iframe", "object", "base", "form", "image", "use"}
        assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("src", "href")]
        assert "49" not in re.findall(r"[\d.]+", text_of(page)) and NASTY in "".join(parsed.text)
        assert {kind for kind, _ in parsed.scripts} == {"application/json", None}
        assert all("<" not in text and json.loads(text) for kind, text in parsed.scripts if kind)


def test_only_the_script_of_the_page_may_run_and_nothing_is_loaded():
    page = run_page(hostile_run())
    ((_, script),) = [item for item in StrictParser(page).scripts if item[0] is None]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = dict(StrictParser(page).attributes)["content"]
    policies = [value for name, value in StrictParser(page).attributes if name == "content" and "src" in value]
    assert policies == [f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"] and policy
    assert not re.search(r"(?:https?:)?//\w", page.replace(NASTY, ""))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)


def test_control_characters_of_answers_are_visible():
    run = full_run()
    run.samples[1]["samples"][0]["answer"] = "a\x1b[31m\u202eb\nc"
    page = run_page(run)
    assert "a␛[31m&lt;U+202E&gt;b\nc" in page and "\x1b" not in page and "\u202e" not in page


@pytest.mark.parametrize(
    "run",
    [
        make_run([None] * 20, norms=[None] * 20),
        make_run([2.0]),
        replace(make_run([2.0], validation={0: 2.1}), rows=[{"step": 0, "epoch": 0.0, "val/loss": 2.1}]),
        replace(make_run([2.0]), rows=[{"step": 3}], config={}),
        replace(make_run(GOOD), rows=make_run(GOOD).rows[:17]),
        make_run([1e308, 1.0, None, -3.0], validation={2: math.inf, 3: 1e-9}),
        make_run(GOOD, answers=[("", False)]),
    ],
    ids=["no finite loss", "one step", "step 0 only", "no metrics", "still running", "odd values", "empty answer"],
)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_odd_runs_have_a_page(run, language):
    for page in (run_page(run, language), comparison_page([run, full_run()], language)):
        assert StrictParser(page).text and not re.search(r"\bnan\b|undefined|None\b", " ".join(StrictParser(page).text))


ODD = [None, True, 0, -1, 2**70, -1e308, math.nan, -math.inf, 1e-320, "x", "", [], [1], {}, {"a": 1}]


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_files_that_were_edited_have_a_page(tmp_path, value):
    """Each key of a row, of the configuration, of a sample and of run.json in turn has a value of another kind."""
    folder = write_run(tmp_path / "run", full_run())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for place, key in enumerate(sorted({*rows[0], *rows[1], *rows[-1]} - {"step", "format_version"})):
        rows[place + 5][key] = value
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = dict.fromkeys(("set", "prompt", "reference", "is_truncated"), value) | {"answer": "a"}
    (folder / "samples.jsonl").write_text(
        "".join(f'{{"step": {n}, "samples": [{json.dumps(sample)}]}}\n' for n in (0, 9))
    )
    (folder / "run.json").write_text(json.dumps(dict.fromkeys(summary(full_run()), value)))
    config = {group: dict.fromkeys(keys, value) for group, keys in full_run().config.items()}
    for edited in (full_run().config, config, dict.fromkeys(config, value)):
        (folder / "config.yaml").write_text(yaml.safe_dump(edited))
        run = read_run(folder)
        assert StrictParser(run_page(run)).text and StrictParser(comparison_page([run, full_run()])).text
        json.dumps(as_json([run]), allow_nan=False)


def test_a_long_run_has_a_small_page():
    losses = noisy(falling(100_000))
    losses[54_321] = 77.25
    page = run_page(make_run(losses, validation={step: 2.0 for step in range(0, 100_001, 500)}))
    assert len(page) < 300_000
    assert '"77.25"' in page  # the highest value can be pointed at
    assert page.count("<tr") < 100


def test_a_resumed_run_that_is_worse_marks_its_best_step():
    run = make_run(GOOD, validation={10: 1.2, 30: 1.9}, trainer__early_stopping={"metric": "val/loss", "mode": "min"})
    assert "best at step 10" in text_of(run_page(run))


def test_every_text_of_the_pages_has_a_chinese_one():
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.glob("templates/*.html"))
    code = "".join((PACKAGE / name).read_text(encoding="utf-8") for name in ("page.py", "compare.py"))
    used = {text for _, text in re.findall(r"""\bt\((["'])(.+?)\1""", source)}
    used |= set(re.findall(r"""\b(?:t|translate|chart)\(\s*"([^"]+)\"""", code))
    constants = re.findall(r'^    (?:\("[\w/]+", \w+, |"[\w/]+": )"([^"]+)"', code, re.M)
    same = {"BLEU-4", "ROUGE-L"}
    assert len(used) > 60 and len(constants) > 15
    assert not (used | set(constants)) - set(CHINESE_PAGE) - same
    assert not set(CHINESE_PAGE) - used - set(constants)
    for english, chinese in CHINESE_PAGE.items():
        assert sorted(re.findall(r"{.*?}", english)) == sorted(re.findall(r"{.*?}", chinese))


def test_a_chinese_page_has_no_english_headings():
    page = run_page(full_run(), "zh")
    headings = re.findall(r"<h[234][^>]*>([^<]+)<", page)
    assert '<html lang="zh-CN">' in page and len(headings) > 10
    assert [text for text in headings if text.isascii()] == ["BLEU-4"]


def test_a_comparison_marks_the_best_run():
    good = replace(full_run(), folder=full_run().folder / "good")
    bad = replace(make_run(GOOD, validation={0: 2.5, 60: 2.4}, rate=1e-3), folder=good.folder.parent / "bad")
    rows = {row.name: row for row in results([bad, good])}
    assert rows["Validation loss"].texts == ["2.400", "1.800"] and rows["Validation loss"].best == 1
    assert rows["BLEU-4"].texts == ["", "21.5"] and rows["BLEU-4"].best is None
    assert rows["Training loss, mean of the last 7 steps"].best is None  # equal
    text = text_of(comparison_page([bad, good]))
    assert "optim.lr 0.001 2.0e-05" in text and "trainer.total_training_steps 60" not in text.split("Curves")[0]


def validated(folder, loss, tokens=500, **settings):
    run = make_run(GOOD, validation={60: loss}, **settings)
    rows = [row | ({"val/tokens": tokens} if "val/loss" in row else {}) for row in run.rows]
    return replace(run, rows=rows, folder=run.folder / folder)


@pytest.mark.parametrize(
    ("settings", "other", "tokens", "best"),
    [
        ({}, {}, 500, 1),
        ({"optim__lr": 1e-3}, {"trainer__seed": 7}, 500, 1),
        ({"data__val_files": "a.json"}, {"data__val_files": "b.json"}, 500, None),
        ({"data__val_ratio": 0.1}, {"data__val_ratio": 0.1}, 500, 1),
        ({"data__val_ratio": 0.1}, {"data__val_ratio": 0.1, "trainer__seed": 7}, 500, None),
        ({"data__val_files": "a.json"}, {"data__val_files": "a.json"}, 501, None),
        ({"eval__limit": 5}, {}, 500, None),
    ],
)
def test_no_run_is_the_best_on_other_validation_data(settings, other, tokens, best):
    runs = [validated("a", 2.0, **settings), validated("b", 1.0, tokens, **other)]
    rows = {row.name: row for row in results(runs)}
    assert rows["Validation loss"].best == best
    assert ("validated on different data" in text_of(comparison_page(runs))) == (best is None)
    assert ("验证数据不同" in text_of(comparison_page(runs, "zh"))) == (best is None)
    unvalidated = replace(make_run(GOOD, data__val_files="c.json"), folder=runs[0].folder.parent / "c")
    assert next(row.best for row in results([*runs, unvalidated]) if row.name == "Validation loss") == best


def test_runs_in_folders_of_one_name_are_distinguished(tmp_path):
    runs = [replace(full_run(), folder=tmp_path / part / "out") for part in ("a", "b")]
    assert names(runs) == ["a/out", "b/out"]
