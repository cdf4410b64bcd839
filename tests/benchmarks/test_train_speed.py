"""The benchmark of training: its jobs, its arithmetic, its choice, its report; no peer is run here."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from benchmarks import train_speed
from benchmarks.speed import jobs
from benchmarks.speed.inside.chatml import encode
from benchmarks.speed.jobs import JOBS, Counts, Job, long_prompts, make_data, read_turns
from benchmarks.speed.measure import INSIDE, Measurement, RunFailed, counted_by_recipe, keep, kept, read_stopwatch, run
from benchmarks.speed.report import VALIDATION_TARGET, JobResult, notes, section, verdicts
from benchmarks.speed.systems import OURS, PEERS, Configuration, configurations, fastest, our_command
from sft_recipe.cli.flags import parse
from sft_recipe.models.flops import MatmulParams, matmul_params
from sft_recipe.models.memory_estimate import ModelDims

DATA = Path(__file__).parents[2] / "data" / "example_alpaca.json"
CPU = JOBS["cpu"]


@pytest.fixture
def characters() -> Tokenizer:
    """A token a character, but for the marks of ChatML."""
    alphabet = {chr(number): number for number in range(256)} | {"<|im_start|>": 256, "<|im_end|>": 257, "<unk>": 258}
    tokenizer = Tokenizer(models.WordLevel(alphabet, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


def conversation(number: int, answer: str) -> list[dict[str, str]]:
    question = f"question {number} " + "x" * 80
    return [
        {"role": role, "content": text} for role, text in (("system", "s"), ("user", question), ("assistant", answer))
    ]


def test_a_conversation_is_encoded_as_the_template_writes_it(characters):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    prompt, answer = encode(characters, turns)
    assert len(prompt) == len("Suser\nHiE\nSassistant\n") and prompt[0] == 256
    assert answer == [ord("Y"), ord("o"), 257]


def test_counts_are_of_rows_cut_on_the_right(characters):
    rows = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]]  # 21 and 3 and a line break
    assert jobs.count(rows, characters, 100) == Counts(1, 25, 3, 1, 25 * 26 // 2)
    assert jobs.count(rows, characters, 22) == Counts(1, 22, 1, 1, 22 * 23 // 2)
    assert jobs.count(rows, characters, 20) == Counts(1, 20, 0, 0, 20 * 21 // 2)


def test_long_prompts_share_no_context_and_end_in_a_short_answer(characters, monkeypatch):
    monkeypatch.setattr(jobs, "CONTEXT", (300, 600))
    own = [conversation(number, f"answer {number} " + "y" * (5 if number % 2 == 0 else 60)) for number in range(60)]
    made = long_prompts(own, 8, characters, seed=1)
    assert len(made) == 8 and made == long_prompts(own, 8, characters, seed=1)
    seen = set()
    for _, user, answer in made:
        context, _, question = user["content"].partition("Now answer this:\n")
        numbers = {part.split()[0] for part in context.split("Question: question ")[1:]}
        assert numbers and not numbers & seen
        seen |= numbers
        assert len(answer["content"]) <= jobs.SHORT_ANSWER and answer["content"].split()[1] == question.split()[1]
        assert 300 <= len(context) <= 600 + len("Earlier conversations:\n\n")
    asked = {user["content"].partition("Now answer this:\nquestion ")[2].split()[0] for _, user, _ in made}
    assert not asked & seen
    assert len(long_prompts(own, 100, characters, seed=1)) < 15  # as far as the data goes


def test_every_form_of_the_data_holds_the_same_rows(characters, tmp_path):
    import pyarrow.parquet as pq

    data = make_data(Job("few", "Few", rows=5), DATA, characters, tmp_path)
    lines = [json.loads(line)["messages"] for line in (tmp_path / "train.jsonl").open()]
    assert lines == read_turns(DATA)[:5] == pq.read_table(tmp_path / "train.parquet")["messages"].to_pylist()
    assert data.counts.rows == len(lines) and all(turns[0]["role"] == "system" for turns in lines)


CONFIG = dict(
    hidden_size=4, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=10
)  # fmt: skip


@pytest.fixture
def small_model(tmp_path):
    LlamaConfig(**CONFIG, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return tmp_path


def test_the_operations_of_training_by_hand(small_model):
    # a layer: 4x4 and 4x4 for queries and outputs, 4x2 twice for keys and values, 4x6 three times
    products = jobs.products_of(small_model)
    assert products == MatmulParams(layers=2 * (16 + 16 + 8 + 8 + 72), head=40, adapters=0, attention=2 * 2 * 2)
    # two documents of 3 and 2 tokens: 6 + 3 pairs, of 2 products each, 2 operations, forward once and backward twice
    assert products.flops(5, 3, 9) == 6 * 240 * 5 + 6 * 40 * 3 + 2 * 2 * 3 * (2 * 2 * 2) * 9


def test_frozen_weights_need_no_gradient_of_their_own(small_model):
    adapters = 2 * 3 * (8 + 6 + 6 + 8 + 10 + 10 + 10)
    products = jobs.products_of(small_model, lora_rank=3)
    assert products.adapters == adapters
    assert products.flops(5, 3, 9) == 4 * 240 * 5 + 4 * 40 * 3 + 6 * adapters * 5 + 12 * 8 * 9


MLPS = {
    "gated": ("llama", {}, 3 * 4 * 6),
    "plain": ("gpt_neox", {}, 2 * 4 * 6),
    "two of four experts, and their router": ("mixtral", dict(num_local_experts=4), 2 * 3 * 4 * 6 + 4 * 4),
}


@pytest.mark.parametrize("kind", MLPS)
def test_the_weights_of_layers_are_those_that_a_token_meets(kind):
    name, settings, mlp = MLPS[kind]
    config = AutoConfig.for_model(name, **{**CONFIG, "num_key_value_heads": 2, **settings})
    model = AutoModelForCausalLM.from_config(config)
    assert matmul_params(model, ModelDims.of(config.to_dict())) == 2 * (4 * 4 * 4 + mlp)


@pytest.mark.parametrize("name", jobs.SHAPES)
def test_a_model_of_random_weights_has_the_products_that_are_counted(name, tmp_path):
    tiny = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
    jobs.write_random_model(jobs.SHAPES[name] | tiny | {"num_key_value_heads": 2}, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = {name: part.weight.numel() for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    products = jobs.products_of(tmp_path)
    assert (products.head, products.layers) == (weights.pop("lm_head"), sum(weights.values()))


@pytest.mark.parametrize("device", JOBS)
def test_every_job_has_ours_and_peers_that_can_run(device):
    for job in JOBS[device].values():
        found = configurations(job, PEERS)
        assert len({(one.system, one.name) for one in found}) == len(found)
        assert all((INSIDE / one.runner).is_file() for one in found if one.environment)
        assert [one for one in configurations(job, []) if one.environment] == []
        assert ("torchtune" in {one.system for one in found}) == (device == "cpu" and job.name in ("full", "long"))


@pytest.mark.parametrize("job", [*CPU.values(), *JOBS["cuda"].values()], ids=lambda job: f"{job.name}-{job.device}")
def test_our_command_is_one_that_train_sh_reads(job):
    one = next(one for one in configurations(job, []) if not one.environment)
    words = our_command(job, one, Path("model"), Path("train.jsonl"), 3, Path("out"))
    overrides = parse(list(words), {}).overrides
    assert "trainer.total_training_steps=3" in overrides and f"data.max_length={job.max_length}" in overrides
    assert ("lora.enabled=true" in overrides) == bool(job.lora)


SMALL = Configuration(OURS, "small", 512)
LARGE = Configuration(OURS, "large", 2048)
HF = Configuration("hf", "padded", 2048, "trl", "run_hf.py")
PURE = Configuration("torchtune", "weights in bf16", 512, "torchtune", "run_torchtune.py", same_job=False)


def test_the_scan_finds_the_fastest_that_does_the_same_job():
    speeds = {SMALL: 100.0, LARGE: 120.0, HF: 90.0, PURE: 500.0}
    assert fastest(speeds, OURS) == LARGE and fastest(speeds, "hf") == HF
    assert fastest(speeds, "torchtune") is fastest(speeds, "verl") is None


def measured(speed: float, peak: int = 1000, first: float = 10.0, tokens: int = 1000, **other) -> Measurement:
    """Two steps, at `speed` tokens/s."""
    seconds = tokens / speed
    facts = {"gpu_peak": 0, "others_cpu": 0.01, "peak_flops": 1e6, "supervised": [300, 300]} | other
    return Measurement(first - seconds / 2, [first, first + seconds / 2], [tokens // 2] * 2, peak=peak << 20, **facts)


def result(**changes) -> JobResult:
    job = Job("full", "Full fine-tuning", batch_size=5)
    runs = {
        LARGE: {
            0: measured(900, validation_loss=1.503),
            1: measured(200, 700, 6),
            2: measured(400, 700, 6),
            3: measured(300, 700, 6),
        },
        HF: {0: measured(1, validation_loss=1.5), 1: measured(100), 2: measured(250), 3: measured(200)},
        PURE: {0: measured(500, 10)},
    }
    facts = dict(
        job=job, counts=Counts(10, 1000, 600, 10, 5000), products=MatmulParams(10, 5, 0, 2), steps=2, runs=runs
    )
    return JobResult(**(facts | dict(chosen=[LARGE, HF]) | changes))


def test_verdicts_come_from_pairs_of_runs():
    both = [result(), result(job=Job("epoch", "An epoch", batch_size=5))]
    found = {verdict.target: (verdict.word, verdict.reached) for verdict in verdicts(both, "cpu")}
    words = [word for word, _ in found.values()]
    assert found["full: at least 1.5 x the fastest peer"] == (
        "reached",
        "1.60 [1.50, 2.00] (transformers Trainer, padded)",
    )
    assert found[VALIDATION_TARGET][0] == "reached"
    memory = next(value for target, value in found.items() if "memory" in target)
    assert memory == ("reached", "0.70: 700 of 1,000 MiB at 2,048 tokens (transformers Trainer, padded)")
    assert next(value for target, value in found.items() if "first step" in target)[0] == "reached"
    assert words.count("not measured") == 6  # verl, long, lora, ranks, two on a GPU
    # 6 x 10 x 1000 + 6 x 5 x 600 + 12 x 2 x 5000 operations, of 1e6 a second
    assert next(value for target, value in found.items() if "peak" in target) == (
        "**not reached**",
        "0.06 [0.04, 0.08]",
    )


def test_a_part_of_an_epoch_compares_no_tokens_and_no_losses():
    assert "not compared" in notes(result(steps=1))[0]
    part = result(job=Job("epoch", "An epoch", batch_size=5), steps=1)
    assert {verdict.target: verdict for verdict in verdicts([part], "cpu")}[VALIDATION_TARGET].is_reached is None


def test_an_epoch_must_have_trained_the_same_tokens():
    assert "Every system trained and supervised the same tokens" in notes(result())[0]

    def describe(one: Configuration, tokens: int, supervised: int) -> str:
        run = measured(100, tokens=tokens, supervised=[supervised, 0])
        return notes(result(runs={one: {0: run}}, chosen=[]))[0]

    packed = Configuration("llamafactory", "packed", 512, "llamafactory", options={"packing": True})
    assert describe(HF, 1000, 610).startswith("Every")  # learns the line breaks after ten answers
    assert describe(HF, 1000, 595).startswith("Cuts long rows in another place")
    assert describe(HF, 1000, 617).startswith("**Not the same tokens**")
    assert describe(SMALL, 1000, 601).startswith("**Not the same tokens**")
    assert describe(HF, 950, 600).startswith("**Not the same tokens**")
    assert describe(packed, 950, 600).startswith("Leaves the last packs out")


def test_a_disturbed_run_is_reported():
    run = measured(100, others_cpu=0.2)
    assert any("Disturbed" in note and "20%" in note for note in notes(result(runs={HF: {0: run}}, chosen=[])))


def test_the_section_hides_no_failure_and_names_no_folder(tmp_path):
    options = train_speed.parse_options(["--data", str(tmp_path / "a.json"), "--peers", "hf,verl", "--validate"])
    command = train_speed.command_line(options)
    text = section([result()], {"full: verl": f"no file {tmp_path}"}, "cpu", command)
    assert str(tmp_path) not in text and "Failed: full: verl" in text and "--peers hf,verl --data a.json" in text
    assert "| ours | large | 3 | 300 [200, 400] |" in text and "| torchtune | weights in bf16 | scan | 500 |" in text
    assert "not measured" in section([], {}, "cuda", command)


@pytest.mark.parametrize("option", ["steps", "rows", "batch-size"])
def test_numbers_may_differ_by_job(option):
    options = train_speed.parse_options([f"--{option}", "long=4,8"])
    assert f"--{option} 8,long=4" in train_speed.command_line(options)
    numbers, jobs = vars(options)[option.replace("-", "_")], JOBS["cpu"]
    assert [train_speed.of_job(numbers, jobs[name], 16) for name in ("long", "full")] == [4, 8]
    assert train_speed.of_job({"long": 4}, jobs["full"], 16) == 16


def test_unknown_names_are_reported(capsys):
    with pytest.raises(SystemExit):
        train_speed.parse_options(["--peers", "nobody"])
    assert "nobody: there is hf, trl" in capsys.readouterr().err


def test_measurements_are_kept(tmp_path):
    path = tmp_path / "results" / "one.json"
    assert kept(path) is None
    keep(measured(100), {"job": "full"}, path)
    assert kept(path) == measured(100)


TRAINS = """
import importlib.util, time
importlib.util.find_spec("torch")  # a look before the import
import torch
model = torch.nn.Linear(2, 2)
with torch.no_grad():
    model(torch.ones(1, 2))
time.sleep(0.2)
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(2):
    import stopwatch
    pad = torch.tensor([[5, 6, 2, 2]])
    stopwatch.saw(pad, torch.tensor([[-100, 6, -100, -100]]), torch.ones(1, 4))
    model(torch.ones(1, 2)).sum().backward()
    time.sleep(0.1)
    optimizer.step()
"""


def test_the_stop_watch_sees_training_in_any_process(tmp_path):
    (tmp_path / "train.py").write_text(TRAINS)
    ran = run([sys.executable, str(tmp_path / "train.py")], {}, tmp_path / "log.txt", tmp_path / "watch")
    found = read_stopwatch(tmp_path / "watch", ran, 1.0)
    assert found.tokens == [2, 2] and found.supervised == [1, 1] and found.peak > 50 << 20
    assert 0.2 <= found.seconds < found.first_step
    (tmp_path / "metrics.jsonl").write_text('{"train/tokens": 9, "train/supervised_tokens": 4}\n' * 2)
    assert counted_by_recipe(found, tmp_path / "metrics.jsonl").tokens == [9, 9]


def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(RunFailed, match="no such thing"):
        run([sys.executable, "-c", "raise ValueError('no such thing')"], {}, tmp_path / "log.txt", tmp_path / "watch")
    done = run([sys.executable, "-c", ""], {}, tmp_path / "log.txt", tmp_path / "watch")
    with pytest.raises(RunFailed, match="no step"):
        read_stopwatch(tmp_path / "watch", done, 1.0)
