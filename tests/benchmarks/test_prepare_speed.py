"""The benchmark of preparation: its corpus, its stopwatch and its tables; the peers themselves are not run here."""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks import prepare_speed
from benchmarks.prepare import measure as measuring
from benchmarks.prepare.corpus import resample, write_corpora
from benchmarks.prepare.measure import Measured, RunFailed, measure
from benchmarks.prepare.report import report
from benchmarks.prepare.systems import OURS, SYSTEMS, Run
from sft_recipe.data.formats import read_conversations

DATA = Path(__file__).parents[2] / "data"
FILES = [DATA / "example_alpaca.json", DATA / "example_messages.jsonl"]


def test_resampled_conversations_are_seeded_and_no_two_are_alike():
    corpus = list(resample(FILES, 300))
    assert corpus == list(resample(FILES, 300)) != list(resample(FILES, 300, seed=1))
    assert len({json.dumps(turns) for turns in corpus}) == 300


def test_answers_are_made_of_the_sentences_of_real_ones():
    real = [turn.content for path in FILES for one in read_conversations(path) for turn in one.messages]
    for turns in resample(FILES, 30):
        assert turns[-1]["role"] == "assistant"
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        assert all(
            any(part.strip() in text for text in real)
            for answer in answers
            for part in re.split(r"(?<=[.!?。！？\n])", answer)
        )


def test_every_form_of_a_corpus_holds_the_same_conversations(tmp_path):
    write_corpora(FILES, [3, 20], tmp_path)
    for size in (3, 20):
        lines = [json.loads(line)["messages"] for line in (tmp_path / f"{size}.messages.jsonl").open()]
        pairs = [json.loads(line) for line in (tmp_path / f"{size}.completion.jsonl").open()]
        assert lines == list(resample(FILES, 20))[:size]
        assert lines == [pair["prompt"] + pair["completion"] for pair in pairs]
        assert lines == pq.read_table(tmp_path / f"{size}.messages.parquet")["messages"].to_pylist()


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Measures a runner with this text."""
    (tmp_path / "clock.py").write_text((Path(measuring.__file__).parent / "clock.py").read_text())
    monkeypatch.setattr(measuring, "HERE", tmp_path)

    def run(text: str) -> Measured:
        (tmp_path / "run.py").write_text("import sys, time\nfrom clock import tell\n" + text)
        return measure(sys.executable, "run.py", "an argument", environment={})

    return run


def test_the_clock_runs_from_begin_to_ready(runner):
    measured = runner(
        "time.sleep(0.5); earliest = time.monotonic(); tell('begin'); begun = time.monotonic(); print('noise')\n"
        "time.sleep(0.1); nearly = time.monotonic(); tell('ready', said=sys.argv[1]); latest = time.monotonic()\n"
        "time.sleep(0.1); tell('counted', tokens=3, least=nearly - begun, most=latest - earliest)"
    )
    least, most = measured.facts.pop("least"), measured.facts.pop("most")
    assert least <= measured.seconds <= most and measured.start_seconds >= 0.5
    assert measured.facts == {"said": "an argument", "tokens": 3}


def test_memory_is_that_of_all_processes_until_ready(runner):
    hold = "block = b'x' * (64 << 20)\n"
    child = hold + "print('holding', flush=True); input()"
    measured = runner(
        "import subprocess\ntell('begin')\n"
        f"command = dict(args=[sys.executable, '-c', {child!r}], stdin=-1, stdout=-1)\n"
        "others = [subprocess.Popen(**command) for _ in range(2)]\n"
        f"{hold}[other.stdout.readline() for other in others]\ntime.sleep(1)\ntell('ready')\n"
        "more = b'x' * (300 << 20)\n[other.communicate(b'end') for other in others]"
    )
    assert 3 * 64 << 20 < measured.anonymous < measured.peak < 3 * 64 + 200 << 20


@pytest.mark.parametrize("text", ["sys.exit('no such thing')", "tell('begin'); raise ValueError('no such thing')"])
def test_a_runner_that_fails_says_why(runner, text):
    with pytest.raises(RunFailed, match="no such thing"):
        runner(text)


def test_one_that_ends_before_it_is_ready_has_failed(runner):
    with pytest.raises(RunFailed, match="exit code 0"):
        runner("tell('begin')")


def run_of(seconds: float, peak: int, **facts: int) -> Run:
    counted = {"examples": 10, "tokens": 1000, "supervised": 500} | facts
    return Run(Measured(seconds, 1.0, peak << 20, 0, counted), stored=3 << 20, again=0.25)


def test_the_tables_hold_ratios_by_pairs_growth_and_differences():
    verl = SYSTEMS[-1]
    runs = {
        (10, "ours"): [run_of(1, 100), run_of(2, 100), run_of(4, 100)],
        (10, "verl"): [run_of(3, 100), run_of(8, 100), run_of(8, 100)],
        (20, "ours"): [run_of(4, 110)],
        (20, "verl"): [run_of(16, 200, supervised=520)],
    }
    speed, fastest, growth, counts = report([OURS, verl], [10, 20], runs, {})
    assert speed.rows[1] == ["10", "verl", "1", "125", "8.0", "1.0", "100", "none", "the same", "3.00"]
    assert speed.rows[0][-1] == "1.00"
    assert fastest.rows == [["10", "verl", "3.00"], ["20", "verl", "4.00"]]
    assert growth.rows == [["ours", "1.00", "1.10"], ["verl", "1.00", "2.00"]]
    assert counts.rows[-1] == ["20", "verl", "10", "1,000", "520 (+20)"]


def test_a_system_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def measured(python, runner, corpus, tokenizer, cache, *options, environment):
        if runner == "run_verl.py":
            raise RunFailed("no such thing")
        (cache / "lengths.npy").touch()
        return run_of(1, 100).first

    monkeypatch.setattr(prepare_speed, "measure", measured)
    bench = prepare_speed.Bench(tmp_path)
    bench.pythons |= {"trl": "python", "verl": "python"}
    runs = bench.measure_systems(SYSTEMS, [10], repeats=2)
    assert {name: len(own) for (_, name), own in runs.items()} == {system.name: 2 for system in SYSTEMS[:-1]}
    assert bench.failures == {"verl": "no such thing"} and "verl failed: no such thing" in capsys.readouterr().out


def test_the_written_section_names_no_folder_of_this_machine_and_hides_no_failure(tmp_path):
    options = Namespace(sizes=[10], peers=["trl"], data=[tmp_path / "a.json", Path("../b.json")], repeats=1)
    text = prepare_speed.section([], {"verl": f"no file {tmp_path}/c"}, options)
    assert str(tmp_path) not in text and "Failed: verl" in text
    assert "prepare_speed.py --sizes 10 --peers trl --data a.json ../b.json --repeats 1" in text
