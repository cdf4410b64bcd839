"""How often findings are right: python -m benchmarks.findings [--out DIR] [--only NAME ...]

Trains the embedded SmolLM2-135M-Instruct many times for some 30 steps: runs with one fault each, whose first finding
must name it, and healthy runs, which must have none. Every run has its own folder under --out, and a run that is
complete there is not repeated. Writes the table of docs/findings.md.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results import table, write_section
from sft_recipe.errors import RecipeError
from sft_recipe.report.findings import find_problems
from sft_recipe.report.run import Run, read_run

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "findings.md"
EXIT_CODE = "exit_code"  # a file of a complete run
LONGEST_RESPONSE = 120  # characters; short examples make short runs
VALIDATION = 12  # examples for validation
EVALUATED = ["trainer.test_freq=15", "eval.limit=8", "eval.generate=4", "eval.max_new_tokens=24"]
COMMON = [
    *("model.path=SmolLM2-135M-Instruct", "model.verify_first_step=false", "data.max_length=128"),
    *("data.micro_batch_size_per_gpu=4", "trainer.total_training_steps=30", "trainer.save_freq=-1"),
    *("trainer.save_best=false", "trainer.device=cpu", "data.num_workers=1"),
]
LORA = "lora.enabled=true"
TOO_HIGH = ("nonfinite", "exploded", "rising", "oscillating", "high_rate")
TOO_LOW = ("low_rate", "slow")

Record = dict[str, str]


@dataclass(frozen=True)
class Case:
    """A run: its data, its overrides, and what the first finding may be; nothing for a healthy run."""

    name: str
    data: str
    overrides: Sequence[str] = ()
    expected: Sequence[str] = ()
    template: str | None = None


def questions(chinese: bool) -> list[Record]:
    """Return the example questions of a language, each with the first sentences of its answer."""
    records = json.loads((ROOT / "data" / "example_sft.json").read_text(encoding="utf-8"))
    found = []
    for record in records:
        sentences = re.split(r"(?<=[.!?。！？])\s*", record["response"])
        response = sentences[0]
        if chinese != response.isascii() and 4 < len(response) <= LONGEST_RESPONSE // (3 if chinese else 1):
            found.append({"prompt": record["prompt"], "response": response})
    return found


def sums(count: int = 90) -> list[Record]:
    """Return small sums with one number as their answer."""
    generator = random.Random(1)
    pairs = [(generator.randint(2, 50), generator.randint(2, 50)) for _ in range(count)]
    return [{"prompt": f"What is {a} + {b}?", "response": f"{a} + {b} = {a + b}"} for a, b in pairs]


def reviews(count: int = 90) -> list[Record]:
    """Return reviews with a sentiment of one word."""
    generator = random.Random(2)
    things, good = ["film", "phone", "hotel", "book", "meal"], ["great", "lovely", "excellent", "superb"]
    bad, found = ["awful", "dull", "poor", "terrible"], []
    for _ in range(count):
        is_good = generator.random() < 0.5
        word, thing = generator.choice(good if is_good else bad), generator.choice(things)
        response = "positive" if is_good else "negative"
        found.append({"prompt": f"Sentiment of this review: the {thing} was {word}.", "response": response})
    return found


def letters(records: list[Record]) -> list[Record]:
    """Return the records with random letters as their answers, which nothing can learn."""
    generator = random.Random(3)
    return [record | {"response": "".join(generator.choices("bcdfghjklmnpqrstvwxz", k=24))} for record in records]


def repeated(records: list[Record]) -> list[Record]:
    """Return the records with answers that say one phrase again and again."""
    return [record | {"response": "It is good. " * 10} for record in records]


def long_prompts(records: list[Record]) -> list[Record]:
    """Return long prompts with an answer of one letter."""
    text = " ".join(record["response"] for record in records)
    return [{"prompt": text[at : at + 260], "response": "A"} for at in range(0, 90 * 60, 60) if text[at : at + 260]]


def long_answers(records: list[Record]) -> list[Record]:
    """Return the records with answers of several sentences."""
    return [
        record | {"response": " ".join(other["response"] for other in records[at : at + 4])}
        for at, record in enumerate(records)
    ]


DATA: dict[str, Callable[[], list[Record]]] = {
    "english": lambda: questions(chinese=False),
    "chinese": lambda: questions(chinese=True),
    "mixed": lambda: questions(chinese=False)[:40] + questions(chinese=True)[:40],
    "sums": sums,
    "reviews": reviews,
    "random letters": lambda: letters(questions(chinese=False)),
    "repetition": lambda: repeated(questions(chinese=False)),
    "long prompts": lambda: long_prompts(questions(chinese=False)),
    "long answers": lambda: long_answers(questions(chinese=False)),
    "few": lambda: questions(chinese=False)[: 8 + VALIDATION],
}

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "ANSWER{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_END = CHATML.replace("ANSWER", "{% generation %}{{ message.content }}{% endgeneration %}<|im_end|>\n")
ONLY_END = CHATML.replace("ANSWER", "{{ message.content }}{% generation %}<|im_end|>{% endgeneration %}\n")

# In the order in which they run.
CASES = (
    Case("full, defaults", "english"),
    Case("full, rate 1e-7", "english", ["optim.lr=1e-7"], TOO_LOW),
    Case("LoRA, defaults", "english", [LORA]),
    Case("LoRA, rate 1e-7", "english", [LORA, "optim.lr=1e-7"], TOO_LOW),
    Case("full, rate 1e-2", "english", ["optim.lr=1e-2"], TOO_HIGH),
    Case("LoRA, rate 5e-2", "english", [LORA, "optim.lr=5e-2"], TOO_HIGH),
    Case("LoRA, answers cut at 72 tokens", "long answers", [LORA, "data.max_length=72", "data.truncation=right"],
         ["cut_data"]),
    Case("LoRA, end token not supervised", "reviews", [LORA], ["no_end_token"], WITHOUT_END),
    Case("LoRA, Chinese, batch 2", "chinese", [LORA, "data.train_batch_size=2"]),
    Case("LoRA, sums, 1e-4", "sums", [LORA, "optim.lr=1e-4"]),
    Case("full, rate 5e-4, sums", "sums", ["optim.lr=5e-4", "optim.lr_scheduler_type=constant"],
         [*TOO_HIGH, "forgetting"]),
    Case("LoRA, 8 examples, rate 1e-3", "few", [LORA, "optim.lr=1e-3"], ["overfitting"]),
    Case("LoRA, warm-up of 500 steps", "mixed",
         [LORA, "optim.lr_warmup_steps=500", "trainer.total_training_steps=16"], ["long_warmup"]),
    Case("full, batch 32, 3 steps", "english", ["data.train_batch_size=32", "trainer.total_training_steps=3"],
         ["large_batch"]),
    Case("LoRA, answers repeat a phrase", "repetition", [LORA, "optim.lr=1e-3"], ["repeated", "forgetting"]),
    Case("LoRA, only the end token supervised", "english", [LORA, "trainer.total_training_steps=10"],
         ["few_supervised"], ONLY_END),
    Case("LoRA, long prompts", "long prompts", [LORA, "trainer.total_training_steps=10"], ["few_supervised"]),
    Case("LoRA, reviews, no warm-up", "reviews", [LORA, "optim.lr_warmup_steps_ratio=0"]),
    Case("full, sums, 12 steps", "sums", ["trainer.total_training_steps=12"]),
    Case("LoRA, answers of random letters", "random letters", [LORA, "optim.lr=3e-5"], ["flat_high", *TOO_LOW]),
    Case("LoRA, 3 ranks, batch 4", "sums",
         [LORA, "trainer.n_gpus_per_node=3", "trainer.total_training_steps=10"], ["idle_ranks"]),
    Case("LoRA, 2 ranks, batch 4", "sums", [LORA, "trainer.n_gpus_per_node=2"]),
    Case("full, GRAD_CLIP 0.01", "english", ["optim.clip_grad=0.01"], ["clipped"]),
    Case("full, 1e-5, constant", "mixed", ["optim.lr=1e-5", "optim.lr_scheduler_type=constant"]),
    Case("LoRA, most examples too long", "english", [LORA, "data.max_length=56", "trainer.total_training_steps=16"],
         ["dropped_data"]),
    Case("LoRA, rate 2e-6, Chinese", "chinese", [LORA, "optim.lr=2e-6"], TOO_LOW),
    Case("LoRA, rank 32, batch 8", "mixed",
         [LORA, "lora.rank=32", "data.train_batch_size=8", "trainer.total_training_steps=20"]),
)  # fmt: skip
HEALTHY, FAULTY = ([case.name for case in CASES if bool(case.expected) == is_faulty] for is_faulty in (False, True))
# Thresholds were chosen on the other runs.
HELD_OUT = {*HEALTHY[3::2], *FAULTY[3::2]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("/tmp/findings"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs to make now; others stay as they are")
    options = parser.parse_args()
    names = [case.name for case in CASES]
    if unknown := sorted(set(options.only or ()) - set(names)):
        parser.error(f"--only {unknown[0]!r} is no run; there are: {'; '.join(names)}")
    for case in CASES:
        if not options.only or case.name in options.only:
            train(case, options.out)
    done = [case for case in CASES if (folder_of(case, options.out) / EXIT_CODE).is_file()]
    section = results(done, options.out)
    print(section)
    if len(done) == len(CASES):
        write_section("confusion table", section, PAGE)


def folder_of(case: Case, out: Path) -> Path:
    """Return the run folder of a case."""
    return out / re.sub(r"[^a-z0-9.-]+", "_", case.name.lower())


def train(case: Case, out: Path) -> None:
    """Train a case unless it is complete; its checkpoints are removed, since findings do not read them."""
    folder = folder_of(case, out)
    if (folder / EXIT_CODE).is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    training, validation = split(case)
    arguments = [*COMMON, *EVALUATED, f"data.train_files={write(training, out / f'{folder.name}.train.jsonl')}"]
    general = ROOT / "data" / "general.jsonl"
    own = write(validation, out / f"{folder.name}.val.jsonl")
    arguments += [f"data.val_files={{own: '{own}', general: '{general}'}}", f"trainer.output_dir={folder}"]
    if case.template:
        (out / f"{folder.name}.jinja").write_text(case.template)
        arguments.append(f"model.chat_template={out / f'{folder.name}.jinja'}")
    command = [sys.executable, "-m", "sft_recipe.cli.train", *arguments, *case.overrides]
    with (out / f"{folder.name}.log").open("w") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / EXIT_CODE).write_text(str(code))
    print(f"{case.name}: exit code {code}, findings {', '.join(found(case, out)) or 'none'}", flush=True)


def split(case: Case) -> tuple[list[Record], list[Record]]:
    """Return the records to train on and those for validation."""
    records = DATA[case.data]()
    random.Random(0).shuffle(records)
    return records[VALIDATION:], records[:VALIDATION]


def write(records: list[Record], path: Path) -> Path:
    """Write the records as JSON lines; returns the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def found(case: Case, out: Path) -> list[str]:
    """Return the rules that fire at the end of a run; of a healthy one also those that fired at an evaluation."""
    try:
        run = read_run(folder_of(case, out))
    except RecipeError as error:
        return [f"no run: {error}"]
    steps = [run.last_step] if case.expected else [row["step"] for row in run.rows if "val/loss" in row]
    rules = [finding.rule for step in steps for finding in find_problems(until(run, step))]
    return list(dict.fromkeys(rules))


def until(run: Run, step: int) -> Run:
    """Return the run as it was after `step`."""
    rows, samples = ([row for row in part if row["step"] <= step] for part in (run.rows, run.samples))
    return replace(run, rows=rows, samples=samples)


def is_right(case: Case, rules: list[str]) -> bool:
    """Return whether the first finding is the expected one: none for a healthy run."""
    return rules[0] in case.expected if case.expected and rules else not case.expected and not rules


def results(cases: Sequence[Case], out: Path) -> str:
    """Return the section of the page: how many are right, and every run."""
    rows: list[list[str]] = []
    counts: dict[tuple[bool, bool], list[bool]] = {}
    for case in cases:
        rules, held_out = found(case, out), case.name in HELD_OUT
        right = is_right(case, rules)
        counts.setdefault((bool(case.expected), held_out), []).append(right)
        expected = " or ".join(f"`{rule}`" for rule in case.expected) or "none"
        shown = ", ".join(f"`{rule}`" for rule in rules) or "none"
        rows.append([case.name, "held out" if held_out else "tuning", expected, shown, "yes" if right else "**no**"])
    return "\n\n".join([summary(counts), table(["run", "use", "expected first", "found", "right"], rows)])


def summary(counts: dict[tuple[bool, bool], list[bool]]) -> str:
    """Return the counts as a table."""

    def cell(is_fault: bool, held_out: bool) -> str:
        right: list[Any] = counts.get((is_fault, held_out), [])
        return f"{sum(right)} of {len(right)}"

    kinds = {True: "a fault: the first finding names it", False: "healthy: no finding"}
    rows = [[text, cell(is_fault, False), cell(is_fault, True)] for is_fault, text in kinds.items()]
    return table(["runs", "tuning", "held out"], rows)


if __name__ == "__main__":
    main()
