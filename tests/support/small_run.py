"""The small run of the tests of stopping, saving and resuming: two epochs of five steps on any number of ranks."""

import json
from pathlib import Path

STEPS = 10
RECORDS = [{"prompt": f"What is {i} and {i}?", "response": f"It is {2 * i}. " * (1 + i % 5)} for i in range(22)]


def arguments(model: Path, folder: Path, *extra: str) -> list[str]:
    """Return the overrides of the run; its data, token stores and run folder (`out`) are below `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "train.json").write_text(json.dumps(RECORDS[:18]))
    (folder / "val.json").write_text(json.dumps(RECORDS[18:]))
    return [
        f"model.path={model}",
        f"data.train_files={folder}/train.json",
        f"data.val_files={folder}/val.json",
        f"data.cache_dir={folder}/cache",
        f"trainer.output_dir={folder}/out",
        "trainer.device=cpu",
        "trainer.total_epochs=2",
        "trainer.save_freq=2",
        "optim.lr=1e-2",
        *extra,
    ]


def checkpoints(folder: Path) -> list[str]:
    """Return the names in the run's folder of checkpoints."""
    return sorted(path.name for path in (folder / "out/checkpoints").iterdir() if not path.is_symlink())
