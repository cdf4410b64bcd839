"""What a checkpoint costs, against verl's own and a plain torch.save: benchmarks/checkpoint_speed.py

SmolLM2-135M (the embedded model, or --model), full and LoRA, on one GPU or CPU rank. Writes its section of RESULTS.md.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results import machine, table, write_section

SAVES = 7  # in each way, after one to warm up; the median counts
VARIANTS = {"full": [], "LoRA": ["lora.enabled=true"]}
Timed = tuple[float, float]  # seconds until a save is complete, and seconds that it blocks training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for variant, extra in VARIANTS.items():
            rows += [[variant, *row] for row in measured_rows(options.model, Path(folder) / variant, extra)]
    header = ["state", "saved by", "s until complete", "s blocked", "blocked, of verl's", "MB of memory", "MB on disk"]
    section = f"""## What a checkpoint costs

`benchmarks/checkpoint_speed.py --model {options.model}`; {machine()}.
Medians of {SAVES} rounds after a warm-up. Each round saves once in each way; the ratios, with their range, are those of
a round. sft_recipe and verl write the state and the exported model, `torch.save` the state alone. sft_recipe syncs to
the disk before a save counts as complete, and reads it back afterwards, while training continues; the others write into
the page cache. How much reading back and an asynchronous save slow the steps meanwhile is not counted. Memory: the peak
during a save over what was there before it, without the pages of files; an asynchronous save keeps its copy of the
state for the next one.

{table(header, rows)}"""
    print(section)
    write_section("checkpoint speed", section)


def measured_rows(model: str, folder: Path, extra: list[str]) -> list[list[str]]:
    """Set up a run as always, and measure in place of its training."""
    from sft_recipe import main_sft
    from sft_recipe.distributed import process_group

    rows: list[list[str]] = []
    join = process_group.join_process_group

    def join_and_patch(device: str) -> None:
        join(device)
        from sft_recipe.training.trainer import SFTTrainer  # chooses verl's platform, so not before

        def fit(trainer: Any) -> int:
            rows.extend(measure(trainer, folder))
            return 0

        SFTTrainer.fit = fit

    process_group.join_process_group = join_and_patch
    run = [f"model.path={model}", "model.fallback=null", f"trainer.output_dir={folder}", "data.max_length=256", *extra]
    before = dict(os.environ)
    try:
        assert main_sft.main([*run, "trainer.max_ckpt_to_keep=1"]) == 0
    finally:
        process_group.join_process_group = join
        os.environ.clear()
        os.environ.update(before)
    return rows


def measure(trainer: Any, folder: Path) -> list[list[str]]:
    """Rows of the table, without their first column. Every round saves once in each way."""
    trainer.train_step(1)
    own = trainer.checkpoints.folder / "step_1"
    ways: dict[str, tuple[Path, Callable[[], Timed]]] = {
        "verl": (folder / "verl", lambda: waited_for(lambda: save_as_verl(trainer, folder / "verl"))),
        "sft_recipe": (own, own_save(trainer, overlap=False)),
        "sft_recipe, `async_save`": (own, own_save(trainer, overlap=True)),
        "`torch.save`": (folder / "plain", lambda: waited_for(lambda: save_plainly(trainer, folder / "plain"))),
    }
    rounds: dict[str, list[Timed]] = {name: [] for name in ways}
    memory, sizes = {}, {}
    with PeakMemory() as peak:
        for _ in range(1 + SAVES):
            for name, (target, save) in ways.items():
                shutil.rmtree(target, ignore_errors=True)
                os.sync()  # what was written before must not slow this save
                peak.take()
                time.sleep(0.1)
                before = peak.take()
                rounds[name].append(save())
                memory[name] = peak.take() - before
                sizes[name] = size(target)
    return [_row(name, rounds[name][1:], rounds["verl"][1:], memory[name], sizes[name]) for name in ways]


def _row(name: str, saves: list[Timed], verl: list[Timed], memory: float, megabytes: float) -> list[str]:
    took, blocked = (statistics.median(save[part] for save in saves) for part in (0, 1))
    ratios = [own[1] / other[1] for own, other in zip(saves, verl, strict=True)]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return [name, f"{took:.2f}", f"{blocked:.2f}", spread, f"{memory:.0f}", f"{megabytes:.0f}"]


def own_save(trainer: Any, overlap: bool) -> Callable[[], Timed]:
    """Our checkpoints; during an asynchronous one the next steps train until it is complete."""
    from sft_recipe.checkpoint.async_saving import AsyncSaver

    saver = AsyncSaver(trainer.checkpoints, trainer.state, trainer.export, lambda: None, lambda _: None, overlap, 1)

    def save() -> Timed:
        count = len(saver.timings)
        saver.start(1, trainer._metadata(1))
        while len(saver.timings) == count:
            trainer.train_step(1)
            saver.poll(1)
        found = saver.timings[count]
        saver.wait(1)  # until it is read back, as the next save would
        return found

    return save


def waited_for(save: Callable[[], None]) -> Timed:
    """A save that training waits for."""
    began = time.perf_counter()
    save()
    return (time.perf_counter() - began,) * 2


class PeakMemory:
    """The memory of this process that is not file contents, in MB, observed by another process."""

    WATCH = """
import select, sys
from pathlib import Path
status, peak = Path("/proc/" + sys.argv[1] + "/status"), 0
while True:
    peak = max(peak, int(status.read_text().partition("RssAnon:")[2].split()[0]) / 1e3)
    if select.select([sys.stdin], [], [], 0.005)[0]:
        if not sys.stdin.readline():
            break
        print(peak, flush=True)
        peak = 0
"""

    def __enter__(self) -> "PeakMemory":
        command = [sys.executable, "-c", self.WATCH, str(os.getpid())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def take(self) -> float:
        """The peak since the last call."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def save_as_verl(trainer: Any, folder: Path) -> None:
    """verl's FSDPCheckpointManager, as its trainer calls it through the engine."""
    trainer.worker.engine.save_checkpoint(local_path=str(folder), global_step=1)


def save_plainly(trainer: Any, folder: Path) -> None:
    """The same tensors as ours, unsharded, in one file."""
    tensors = trainer.state._to_store(*trainer.state._state_dicts())
    full = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in tensors.items()}
    folder.mkdir()
    torch.save(full, folder / "state.pt")


def size(folder: Path) -> float:
    """Megabytes below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


if __name__ == "__main__":
    main()
