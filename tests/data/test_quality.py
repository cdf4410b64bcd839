"""Near-duplicates against exact similarity, and other doubtful records: found, shown, and dropped on request."""

import json
import random

import pytest

from sft_recipe.cli.prepare import main as prepare
from sft_recipe.cli.preview import main as preview
from sft_recipe.data.formats import read_conversations
from sft_recipe.data.messages import Conversation, Message
from sft_recipe.data.quality import QualityChecks, breaks_off, read_questions, repetition, shingles_of, words_of
from sft_recipe.errors import DataError

WORDS = [
    "red",
    "blue",
    "green",
    "fast",
    "slow",
    "river",
    "mountain",
    "house",
    "tree",
    "cloud",
    "stone",
    "bird",
    "light",
]
QUESTION = "A farmer has seventeen sheep and all but nine of them run away so how many are left?"
LOOP = "We go on and on. " * 20
CODE = "Use this:\n```python\nprint(1)\n"


def talk(prompt, response="Yes.", source=""):
    return Conversation((Message("user", prompt), Message("assistant", response)), source)


def kinds(checks, conversation):
    return [problem.kind for problem in checks.check(conversation)]


def similarity(one, two):
    """The exact Jaccard similarity of the sets of three words in a row."""
    sets = []
    for c in (one, two):
        words = words_of(" ".join(m.content for m in c.messages))
        sets.append({tuple(words[i : i + 3]) for i in range(len(words) - 2)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_near_duplicates_are_those_of_exact_similarity():
    rng = random.Random(0)
    base = [" ".join(rng.choices(WORDS, k=80)) for _ in range(40)]
    texts = []
    for text in base:
        words = text.split()
        for changes in rng.sample(range(12), 3):
            changed = words.copy()
            for place in rng.sample(range(len(words)), changes):
                changed[place] = "other"
            texts.append(" ".join(changed))
    rng.shuffle(texts)
    records = [talk(text, source=f"record {n}") for n, text in enumerate(texts)]
    checks, wrong = QualityChecks(), 0
    for number, record in enumerate(records):
        nearest = max((similarity(record, other) for other in records[:number]), default=0)
        found = "near_duplicates" in kinds(checks, record)
        if abs(nearest - 0.8) > 0.12:  # near the limit MinHash may err
            wrong += found != (nearest > 0.8)
    assert wrong == 0


def test_the_pair_is_named_and_the_first_one_stays():
    checks = QualityChecks()
    text = " ".join(f"{word}{n}" for n in range(5) for word in WORDS)
    assert checks.check(talk(text, source="a, record 1")) == []
    assert checks.check(talk("Nothing like it", source="a, record 2")) == []
    [problem] = checks.check(talk(text + " more", source="a, record 3"))
    assert (problem.kind, problem.reason) == ("near_duplicates", "like a, record 1")


def test_chinese_characters_are_words():
    assert words_of("你好, World! 机器学习 v2") == ["你", "好", "world", "机", "器", "学", "习", "v2"]
    assert len(shingles_of(talk("你好吗", "很好"))) == 3


@pytest.mark.parametrize(
    ("text", "is_contaminated"),
    [
        (f"Please answer: {QUESTION}", True),
        (QUESTION.upper().replace(" ", "  "), True),
        (" ".join(QUESTION.split()[:13]), True),
        (" ".join(QUESTION.split()[:12]), False),
        ("A farmer has many sheep.", False),
        ("what is two plus two equal to", True),  # all words of a short question
        ("what is it", False),
    ],
)
def test_benchmark_questions_are_found(text, is_contaminated):
    checks = QualityChecks([QUESTION, "What is two plus two equal to?", "What is it?"])
    assert ("contaminated" in kinds(checks, talk(text))) == is_contaminated


@pytest.mark.parametrize(
    ("answer", "is_short"),
    [
        ("word " * 50, True),
        ("word " * 50 + "end.", False),
        ("word " * 50 + "and,", True),
        ("学习" * 100, True),
        ("学习" * 100 + "。", False),
        ("Paris", False),
        (CODE, True),
        (CODE + "```", False),
        (CODE + "```\n", False),
        ('{"a": [' + "1, " * 100 + "2]}", False),
    ],
)
def test_answers_that_break_off(answer, is_short):
    assert breaks_off(answer) == is_short


def test_answers_that_repeat_themselves():
    assert repetition(LOOP) and not repetition(" ".join(WORDS * 3)) and not repetition("ha " * 20)
    assert repetition("好的。" * 60)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_questions_of_a_file(tmp_path, name):
    path, questions = tmp_path / name, [QUESTION, "Why?"]
    if name == "a.txt":
        path.write_text("\n\n".join(questions))
    elif name == "a.json":
        path.write_text(json.dumps(questions))
    else:
        path.write_text("".join(json.dumps({"id": 1, "problem": q}) + "\n" for q in questions))
    assert read_questions(path) == questions


@pytest.fixture
def files(tmp_path):
    texts = [" ".join(random.Random(n).choices(WORDS, k=40)) + "." for n in range(6)]
    records = [{"prompt": text, "response": "Fine."} for text in texts]
    records += [
        {"prompt": texts[0] + " Yes.", "response": "Fine."},
        {"prompt": "Go on", "response": LOOP},
        {"prompt": "Code", "response": CODE},
        {"prompt": QUESTION, "response": "Nine."},
    ]
    data, questions, validation = (tmp_path / name for name in ("a.json", "questions.txt", "v.json"))
    data.write_text(json.dumps(records))
    questions.write_text(QUESTION)
    validation.write_text(
        json.dumps([{"prompt": texts[1] + " No.", "response": "Fine."}, {"prompt": "x", "response": "y"}])
    )
    return str(data), str(questions), str(validation)


def test_dropped_records_are_listed_with_the_reason(files, tmp_path, capsys):
    drop = ["--drop", "near_duplicates,repeated,contaminated", "--benchmarks", files[1]]
    assert prepare(["--in", files[0], "--out", str(tmp_path / "out"), "--val_ratio", "0", *drop]) == 0
    output = " ".join(capsys.readouterr().out.split())
    for kind in ("near duplicates", "repeated", "contaminated"):
        assert f"1 dropped: {kind}" in output
    kept = [c.messages[0].content for c in read_conversations(tmp_path / "out/train.parquet")]
    records = json.loads((tmp_path / "a.json").read_text())
    assert kept == [records[n]["prompt"] for n in (0, 1, 2, 3, 4, 5, 8)]  # the code that breaks off is kept
    dropped = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in dropped] == ["near_duplicates", "repeated", "contaminated"]
    assert dropped[0]["reason"] == f"like {files[0]}, record 1" and dropped[0]["source"] == f"{files[0]}, record 7"
    assert dropped[2]["record"]["messages"][0]["content"] == QUESTION


def test_the_preview_counts_and_shows_pairs(files, model_dir, tmp_path, capsys):
    arguments = ["--train_data", files[0], "--val_data", files[2], "--model", str(model_dir), "-n", "0"]
    page = tmp_path / "page.html"
    assert preview([*arguments, "--quality", "--benchmarks", files[1], "--html", str(page)]) == 0
    output = capsys.readouterr().out
    assert f"near duplicates: 1 ({files[0]}, record 7 like {files[0]}, record 1)" in output
    assert f"validation like training: 1 ({files[2]}, record 1 like {files[0]}, record 2)" in output
    assert "truncated: 1 (" in output and "repeated: 1 (" in output and "contaminated: 1 (" in output
    assert "near duplicates: 1" in page.read_text()
    assert preview(arguments) == 0
    output = capsys.readouterr().out
    assert "near duplicates" not in output and "quality" not in output


def test_the_preview_says_that_nothing_was_found(files, model_dir, tmp_path, capsys):
    page, clean = tmp_path / "page.html", tmp_path / "clean.json"
    clean.write_text(json.dumps([{"prompt": "Hi", "response": "Fine."}]))
    arguments = ["--train_data", str(clean), "--model", str(model_dir), "-n", "0", "--quality"]
    assert preview([*arguments, "--html", str(page)]) == 0
    text = "quality: none found (looked for: near duplicates, truncated, repeated)"
    assert f"\n{text}\n" in capsys.readouterr().out and f"{text}." in page.read_text()
    assert preview([*arguments, "--benchmarks", files[1], "--val_data", files[2]]) == 0
    kinds = "near duplicates, contaminated, truncated, repeated, validation like training"
    assert f"\nquality: none found (looked for: {kinds})\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--drop", "bad"], "--drop: 'bad' is none of near_duplicates"),
        (["--drop", "contaminated"], "--drop contaminated and --benchmarks FILE belong together"),
        (["--benchmarks", "q.txt"], "--drop contaminated and --benchmarks FILE belong together"),
        (["--drop", "contaminated", "--benchmarks", "/nowhere/q.txt"], "/nowhere/q.txt cannot be read"),
    ],
)
def test_wrong_arguments_are_one_message(files, tmp_path, capsys, arguments, expected):
    assert prepare(["--in", files[0], "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error


def test_a_record_without_a_question_is_an_error(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"answer": "x"}\n')
    with pytest.raises(DataError, match=r"q.jsonl, line 1: no question; expected one of question, prompt"):
        read_questions(tmp_path / "q.jsonl")
