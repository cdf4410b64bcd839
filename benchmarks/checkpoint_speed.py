"""What a checkpoint costs, against verl's own and a plain torch.save: benchmarks/checkpoint_speed.py

SmolLM2-135M (the embedded model, or --model), full and LoRA, on one GPU or CPU rank. Writes its section of RESULTS.md.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results import machine, table, write_section

SAVES = 3  # of each kind; the median counts
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
    header = ["state", "saved by", "s until complete", "s training blocked", "of verl's", "MB"]
    section = f"""## What a checkpoint costs

`benchmarks/checkpoint_speed.py --model {options.model}`; {machine()}.
Medians of {SAVES} saves after a warm-up. sft_recipe writes the state and the exported model, reads all back for the
checksums, and syncs to the disk; verl and `torch.save` write the state into the page cache, and no model. How much an
asynchronous save slows the steps during it is not counted.

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
    """Rows of the table, without their first column."""
    trainer.train_step(1)
    results = {
        "sft_recipe": own(trainer, overlap=False),
        "sft_recipe, `async_save`": own(trainer, overlap=True),
        "verl": repeated(lambda: save_as_verl(trainer, empty(folder / "verl"))),
        "`torch.save`": repeated(lambda: save_plainly(trainer, empty(folder / "plain"))),
    }
    newest = trainer.checkpoints.folder / "step_1"
    sizes = [size(newest), size(newest), size(folder / "verl"), size(folder / "plain")]
    stall = results["verl"][1]
    return [
        [name, f"{took:.2f}", f"{waited:.2f}", f"{waited / stall:.2f}", f"{megabytes:.0f}"]
        for (name, (took, waited)), megabytes in zip(results.items(), sizes, strict=True)
    ]


def own(trainer: Any, overlap: bool) -> Timed:
    """Our checkpoints; during each asynchronous one the next steps train until it is complete."""
    from sft_recipe.checkpoint.async_saving import AsyncSaver

    saving = AsyncSaver(trainer.checkpoints, trainer.state, trainer.export, lambda: None, lambda _: None, overlap)
    for _ in range(1 + SAVES):
        shutil.rmtree(trainer.checkpoints.folder / "step_1", ignore_errors=True)
        saving.start(1, trainer._metadata(1))
        while overlap and saving._job is not None:
            trainer.train_step(1)
            saving.poll(1)
    took, waited = zip(*saving.timings[1:], strict=True)
    return statistics.median(took), statistics.median(waited)


def repeated(save: Callable[[], None]) -> Timed:
    """A save that training waits for."""
    seconds = []
    for _ in range(1 + SAVES):
        began = time.perf_counter()
        save()
        seconds.append(time.perf_counter() - began)
    return (statistics.median(seconds[1:]),) * 2


def save_as_verl(trainer: Any, folder: Path) -> None:
    """verl's FSDPCheckpointManager, as its trainer calls it through the engine."""
    trainer.worker.engine.save_checkpoint(local_path=str(folder), global_step=1)


def save_plainly(trainer: Any, folder: Path) -> None:
    """The same tensors as ours, unsharded, in one file."""
    tensors = trainer.state._to_store(*trainer.state._state_dicts())
    full = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in tensors.items()}
    torch.save(full, folder / "state.pt")


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def size(folder: Path) -> float:
    """Megabytes below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


if __name__ == "__main__":
    main()
