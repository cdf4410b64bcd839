"""What was measured as tables, and which targets are reached."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median

from benchmarks.peers import ENVIRONMENTS, TORCH
from benchmarks.results import machine, table
from benchmarks.speed.jobs import CONTEXT, JOBS, SHORT_ANSWER, Counts, Job
from benchmarks.speed.measure import Measurement
from benchmarks.speed.systems import LEFT_OUT, OURS, PEERS, Configuration
from sft_recipe.models.flops import FORMULA, MatmulParams

MEBIBYTE = 2**20
DISTURBED = 0.05  # of the machine's CPUs
PACKED_AWAY = 0.08  # of an epoch's tokens that peers may leave out which train whole packs only
CUT_ELSEWHERE = 0.01  # of an epoch's supervised tokens: how else a row that is too long may be cut

NOTES = """\
The clock runs from the first training forward to the end of the last optimizer step, the first step included ("from
step 2": without it). "First step" is the time from the start of the process to the end of its first step, with what
earlier runs left in caches; peers that group rows by length take the longest ones first. "Peak" is the most resident
memory of the training process up to its last step (of the GPU where there is one). Tokens are real ones, not padding:
peers' are counted on their way into the model, ours are those of `metrics.jsonl`. The ratio is ours over the peer, by
pairs of runs of the same round. Validation loss: mean over the answers' tokens up to and including <|im_end|>, by plain
transformers in fp32 over 99 other rows, after one epoch. All systems load and save the model in fp32: bf16
weights would lose most of so few small updates to rounding. Brackets hold minimum and maximum."""


@dataclass(frozen=True)
class JobResult:
    """The runs of a job by configuration and round (0 is the scan), and the configuration that each system goes by."""

    job: Job
    counts: Counts
    products: MatmulParams
    steps: int
    runs: Mapping[Configuration, Mapping[int, Measurement]]
    chosen: Sequence[Configuration]
    loss_before: float | None = None

    @property
    def is_epoch(self) -> bool:
        return self.steps == self.counts.rows / self.job.batch_size

    def of(self, system: str) -> Configuration | None:
        return next((one for one in self.chosen if one.system == system), None)

    def timed(self, configuration: Configuration) -> list[Measurement]:
        """Its runs in rounds; the scan's where there were no rounds."""
        return list(_rounds(self.runs[configuration]).values())

    def ratios(self, ours: Configuration, other: Configuration) -> list[float]:
        """Speeds by pairs of runs of the same round."""
        left, right = (_rounds(self.runs[one]) for one in (ours, other))
        return [left[number].tokens_per_s / right[number].tokens_per_s for number in left if number in right]

    def share(self, measured: Measurement) -> float:
        """Of the matrix product peak. Attention's pairs are taken in proportion to the tokens."""
        tokens, supervised = sum(measured.tokens), sum(measured.supervised)
        pairs = self.counts.pairs * tokens / self.counts.tokens
        return self.products.flops(tokens, supervised, pairs) / measured.seconds / measured.peak_flops

    def loss(self, configuration: Configuration) -> float | None:
        return next((run.validation_loss for run in self.runs[configuration].values() if run.validation_loss), None)


def _rounds(runs: Mapping[int, Measurement]) -> Mapping[int, Measurement]:
    return {number: run for number, run in runs.items() if number} or runs


@dataclass(frozen=True)
class Verdict:
    """A target beside what was reached, in words; `is_reached` is None where that was not measured."""

    target: str
    reached: str = "not measured"
    is_reached: bool | None = None

    @property
    def word(self) -> str:
        return {None: "not measured", True: "reached", False: "**not reached**"}[self.is_reached]


def section(results: Sequence[JobResult], failures: Mapping[str, str], device: str, command: str) -> str:
    """For RESULTS.md; without the output of failed runs, which may name folders of this machine."""
    where = " on a GPU" if device == "cuda" else ""
    where += ", in fp32" if any(result.job.compute == "fp32" for result in results) else ""
    parts = [f"## Training speed{where}", f"    {command}"]
    parts += [f"{machine()}. {versions(results)}", NOTES, FORMULA]
    rows = [[verdict.target, verdict.reached, verdict.word] for verdict in verdicts(results, device)]
    parts.append(table(["target", "reached", "verdict"], rows))
    for result in results:
        parts.append(f"### {result.job.title}")
        parts.append(f"{describe(result)}\n\n{job_table(result)}")
        parts += [f"- {note}" for note in notes(result)]
    parts += [f"**Failed: {what}.** The command shows why." for what in failures]
    return "\n\n".join(parts).replace("\n\n- ", "\n- ").replace("|\n- ", "|\n\n- ")


def versions(results: Iterable[JobResult]) -> str:
    used = dict.fromkeys(one.environment for result in results for one in result.runs if one.environment)
    texts = {name: [TORCH, *ENVIRONMENTS[name].packages] for name in used}
    texts = {OURS: [f"{name}=={version(name)}" for name in ("torch", "verl", "transformers", "peft")]} | texts
    return " ".join(f"{name}: {', '.join(packages)}." for name, packages in texts.items())


def describe(result: JobResult) -> str:
    job, counts = result.job, result.counts
    kind = f"LoRA r={job.lora.rank}, alpha={job.lora.alpha}, all linear layers but the head" if job.lora else "full"
    epoch = ", an epoch" if result.is_epoch else ", a part of an epoch: systems see different rows"
    text = (
        f"{job.model}, {kind}, {job.compute} over {job.weights} weights, {counts.rows} rows of "
        f"{counts.tokens:,} tokens, "
        f"{counts.supervised:,} of them supervised; {job.batch_size} examples a step, each at most "
        f"{job.max_length:,} tokens, {result.steps} steps{epoch}; AdamW, lr {job.lr:g} constant, "
        f"weight decay {job.weight_decay}, clip {job.clip}, seed {job.seed}."
    )
    if job.long:
        text += (
            f" Each prompt has a context of {CONTEXT[0]:,} to {CONTEXT[1]:,} tokens of other conversations, which no "
            f"other prompt has, and a question with an answer of at most {SHORT_ANSWER} tokens."
        )
    if result.loss_before is not None:
        text += f" Validation loss before: {result.loss_before:.4f}."
    return text


def job_table(result: JobResult) -> str:
    header = ["system", "configuration", "runs", "tokens/s", "from step 2", "ours is so many times as fast"]
    header += ["peak MiB", "first step s", "share of peak", "validation loss"]
    rest = [one for one in result.runs if one not in result.chosen]
    return table(header, [_row(result, one) for one in [*result.chosen, *rest]])


def _row(result: JobResult, one: Configuration) -> list[str]:
    runs, ours, loss = result.timed(one), result.of(OURS), result.loss(one)
    ratios = result.ratios(ours, one) if ours and one in result.chosen and one != ours else []
    return [
        PEERS.get(one.system, one.system),
        one.name,
        f"{len(runs)}" if one in result.chosen else "scan",
        spread([run.tokens_per_s for run in runs], ",.0f"),
        f"{median(run.later_tokens_per_s for run in runs):,.0f}" if result.steps > 1 else "",
        spread(ratios, ".2f"),
        f"{peak_of(runs):,.0f}",
        f"{median(run.first_step for run in runs):.1f}",
        f"{median(result.share(run) for run in runs):.2f}",
        f"{loss:.4f}" if loss is not None else "",
    ]


def spread(values: Sequence[float], form: str) -> str:
    """Median [least, most]."""
    if not values:
        return ""
    middle = f"{median(values):{form}}"
    return middle if len(values) == 1 else f"{middle} [{min(values):{form}}, {max(values):{form}}]"


def peak_of(runs: Sequence[Measurement]) -> float:
    """MiB; of the GPU where there is one."""
    return median(run.gpu_peak or run.peak for run in runs) / MEBIBYTE


def notes(result: JobResult) -> list[str]:
    """What a reader must know about this job's numbers: token counts, disturbed runs, who was left out."""
    notes = [_count_note(result, one) for one in result.runs] if result.is_epoch else []
    if not result.is_epoch:
        notes.append("Numbers of tokens are not compared: in a part of an epoch every system trains different rows.")
    elif not any(notes):
        notes.append("Every system trained and supervised the same tokens, but for line breaks after answers.")
    runs = [(one, number, run) for one, own in result.runs.items() for number, run in own.items()]
    if disturbed := [entry for entry in runs if entry[2].others_cpu > DISTURBED]:
        worst = max(run.others_cpu for _, _, run in disturbed)
        notes.append(
            f"**Disturbed:** in {len(disturbed)} of {len(runs)} runs other processes took more than {DISTURBED:.0%} "
            f"of the CPUs, up to {worst:.0%}."
        )
    else:
        most = max(run.others_cpu for _, _, run in runs)
        notes.append(f"Other processes took at most {most:.1%} of the CPUs during a run.")
    peaks = [run.peak_flops for _, _, run in runs]
    notes.append(f"Peak of matrix products: {spread([peak / 1e9 for peak in peaks], ',.0f')} GFLOP/s.")
    notes += [f"Left out: {reason}." for (job, _), reason in LEFT_OUT.items() if job == result.job.name]
    return [note for note in notes if note]


def _count_note(result: JobResult, one: Configuration) -> str:
    """How a whole epoch's tokens differ from the job's; nothing where they do not, line breaks after answers aside.

    A peer that learns the line break after each answer, which every row but a cut one has, may have that many more.
    """
    run, counts = next(iter(result.runs[one].values())), result.counts
    tokens, supervised = sum(run.tokens) - counts.tokens, sum(run.supervised) - counts.supervised
    if tokens == 0 and 0 <= supervised <= (counts.answers if one.environment else 0):
        return ""
    if one.options.get("packing") and 0 <= -tokens <= PACKED_AWAY * counts.tokens:
        word = "Leaves the last packs out"
    elif one.environment and tokens == 0 and abs(supervised) <= CUT_ELSEWHERE * counts.supervised:
        word = "Cuts long rows in another place"
    else:
        word = "**Not the same tokens**"
    return f"{word}: {one} trained {tokens:+,} tokens, {supervised:+,} supervised."


def verdicts(results: Sequence[JobResult], device: str) -> list[Verdict]:
    by_name = {result.job.name: result for result in results}

    def of(name: str, verdict: Callable[[JobResult], Verdict], otherwise: str) -> Verdict:
        return verdict(by_name[name]) if name in by_name else Verdict(otherwise)

    if device == "cuda":
        return [
            of(job.name, lambda result: _against_fastest(result, None), f"{job.title}: faster than the fastest peer")
            for job in JOBS["cuda"].values()
        ]
    speed = {name: f"{name}: at least {bound} x the fastest peer" for name, bound in FASTEST.items()}
    first = [
        of(name, lambda result: _against_fastest(result, FASTEST[result.job.name]), speed[name]) for name in FASTEST
    ]
    first.insert(1, of("full", _against_verl, VERL_TARGET))
    rest = [
        of("full", _peak_share, SHARE_TARGET),
        of("full", _memory, MEMORY_TARGET),
        of("full", _first_step, FIRST_TARGET),
        of("ranks", _ranks, RANKS_TARGET),
        of("epoch", _validation, VALIDATION_TARGET),
    ]
    elsewhere = "`python benchmarks/train_speed.py --device cuda` writes a separate section"
    return first + rest + [Verdict(f"on a GPU: {job.title}", elsewhere) for job in JOBS["cuda"].values()]


FASTEST = {"full": 1.5, "long": 1.8, "lora": 1.5}
VERL_TARGET = "full: at least 1.7 x verl"
SHARE_TARGET = "full: at least 0.65 of the matrix product peak"
MEMORY_TARGET = "full: at most 0.8 of the leanest peer's memory, at equal tokens of a micro-batch"
FIRST_TARGET = "full: first step in at most 0.7 of the fastest peer's time"
RANKS_TARGET = "ranks: two ranks at least 0.9 of one"
VALIDATION_TARGET = "epoch: validation loss within 0.5% of transformers' Trainer"


def _against_fastest(result: JobResult, bound: float | None) -> Verdict:
    """Against the peer to which our lead is the smallest."""
    wanted = f"{result.job.name}: " + (f"at least {bound} x" if bound else "faster than") + " the fastest peer"
    ours = result.of(OURS)
    found = [
        (median(ratios), spread(ratios, ".2f"), str(one))
        for one in result.chosen
        if ours and one != ours and (ratios := result.ratios(ours, one))
    ]
    if not found:
        return Verdict(wanted)
    ratio, text, name = min(found)
    return Verdict(wanted, f"{text} ({name})", ratio >= (bound or 1.0))


def _against_verl(result: JobResult) -> Verdict:
    ours, verl = result.of(OURS), result.of("verl")
    ratios = result.ratios(ours, verl) if ours and verl else []
    return Verdict(VERL_TARGET, spread(ratios, ".2f"), median(ratios) >= 1.7) if ratios else Verdict(VERL_TARGET)


def _peak_share(result: JobResult) -> Verdict:
    ours = result.of(OURS)
    if not ours:
        return Verdict(SHARE_TARGET)
    shares = [result.share(run) for run in result.timed(ours)]
    return Verdict(SHARE_TARGET, spread(shares, ".2f"), median(shares) >= 0.65)


def _memory(result: JobResult) -> Verdict:
    """The worst case among the sizes of micro-batches that we and a peer have measured."""
    peaks = {one: peak_of(result.timed(one)) for one in result.runs if one.same_job}
    found = []
    for ours in (one for one in peaks if one.system == OURS):
        others = [one for one in peaks if one.system != OURS and one.micro_tokens == ours.micro_tokens]
        if others:
            leanest = min(others, key=lambda one: peaks[one])
            text = f"{peaks[ours]:,.0f} of {peaks[leanest]:,.0f} MiB at {ours.micro_tokens:,} tokens ({leanest})"
            found.append((peaks[ours] / peaks[leanest], text))
    if not found:
        return Verdict(MEMORY_TARGET)
    worst = max(found)[0]
    return Verdict(MEMORY_TARGET, "; ".join(f"{ratio:.2f}: {text}" for ratio, text in found), worst <= 0.8)


def _first_step(result: JobResult) -> Verdict:
    first = {one.system: (median(run.first_step for run in result.timed(one)), str(one)) for one in result.chosen}
    ours = first.pop(OURS, None)
    if not ours or not first:
        return Verdict(FIRST_TARGET)
    seconds, name = min(first.values())
    ratio = ours[0] / seconds
    return Verdict(FIRST_TARGET, f"{ratio:.2f}: {ours[0]:.1f} of {seconds:.1f} s ({name})", ratio <= 0.7)


def _ranks(result: JobResult) -> Verdict:
    one, two = result.of("one rank"), result.of("two ranks")
    ratios = result.ratios(two, one) if one and two else []
    return Verdict(RANKS_TARGET, spread(ratios, ".2f"), median(ratios) >= 0.9) if ratios else Verdict(RANKS_TARGET)


def _validation(result: JobResult) -> Verdict:
    losses = [result.loss(one) if one else None for one in (result.of(OURS), result.of("hf"))]
    ours, theirs = losses
    if ours is None or theirs is None:
        return Verdict(VALIDATION_TARGET)
    if not result.is_epoch:
        return Verdict(VALIDATION_TARGET, f"{ours:.4f} and {theirs:.4f}, but not after an epoch")
    difference = abs(ours - theirs) / theirs
    return Verdict(VALIDATION_TARGET, f"{ours:.4f} and {theirs:.4f}: {difference:.2%}", difference <= 0.005)
